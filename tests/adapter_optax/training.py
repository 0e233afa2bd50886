"""Small trainings for the tests of what ``swa`` is composed with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_core import SWAConfig
from swa_optax import averaged_params


def quick_options():
    """Options by which XLA compiles small programs for the CPU in a fifth of the time, if known."""
    options = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 0}
    try:
        jax.jit(lambda x: x, compiler_options=options)(1)
    except (RuntimeError, TypeError):
        return None
    return options


# For tests of what is computed. What is compiled of it, in the default way, others test.
quick_jit = functools.partial(jax.jit, compiler_options=quick_options())

EVERY = SWAConfig(start="1step", every="1step")


def params_like():
    # Strong dtypes: of weak ones (jnp.array(2.0)) optax itself makes strong ones, and so two or
    # three compilations.
    return {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}


def gradients(n, params, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(jnp.shape(leaf)), "f4"), params
        )


def bad_at(places, grads):
    """The gradients, with NaN for those of the micro-steps ``places``."""
    for place, gradient in enumerate(grads):
        bad = place in places
        yield jax.tree.map(lambda leaf, bad=bad: leaf * np.nan if bad else leaf, gradient)


def train(tx, grads, params, *, jit=quick_jit, **extra):
    """Trains, and returns the parameters, the state and all the parameters that came about.

    The step is compiled once, whatever it is composed of.
    """

    @jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, visited = tx.init(params), []
    for gradient in grads:
        params, state = step(params, state, gradient)
        visited.append(params)
    assert step._cache_size() == 1
    return params, state, visited


def trained(tx, n=4, **extra):
    """``train`` with random gradients of ``params_like``."""
    return train(tx, gradients(n, params_like()), params_like(), **extra)


def mean(visited):
    """The mean of several trees, in float64."""
    return jax.tree.map(lambda *leaves: np.mean(np.asarray(leaves, np.float64), axis=0), *visited)


def assert_close(got, expected, rtol=2e-6, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def assert_average(state, params, visited):
    """What is read from the state is the mean of these parameters."""
    assert_close(averaged_params(state, params), mean(visited))


def same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
