"""Trainings to be interrupted: real optimizers, nested, with snapshots of NaN among the others."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_optax import swa

UPDATES = 10
BAD = (3, 6)  # the updates that lead to NaN: one that is a snapshot of all, one of some


def poison():
    """Makes updates NaN where it is told to, as a loss that explodes does."""

    def update(updates, state, params=None, *, bad=False, **extra):
        return jax.tree.map(lambda u: jnp.where(bad, jnp.asarray(jnp.nan, u.dtype), u), updates), (
            state
        )

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def chained(inner, config):
    return optax.chain(inner, poison(), swa(config))


CONFIGS = {
    "chain": SWAConfig(start="2step", every="1step", rule=Uniform()),
    "inject_hyperparams": SWAConfig(start="1step", every="2step", rule=Polynomial(eta=3)),
    "MultiSteps": SWAConfig(start="1step", every="1step", rule=EMA(half_life=2)),
}


def optimizer(name):
    config = CONFIGS[name]
    if name == "chain":
        return chained(optax.sgd(0.1, momentum=0.9), config)
    if name == "inject_hyperparams":
        rate = optax.exponential_decay(0.1, 3, 0.5)
        return optax.inject_hyperparams(lambda rate: chained(optax.sgd(rate), config))(rate=rate)
    return optax.MultiSteps(chained(optax.adam(0.1), config), 2).gradient_transformation()


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)},
        "half": [jnp.asarray(rng.standard_normal(3), jnp.bfloat16), jnp.float32(0.25)],
        "frozen": None,
    }


class Stage(NamedTuple):
    params: object
    state: object


@functools.cache
def functions(name):
    """``init(seed)``, a compiled ``step(stage, x)`` and a compiled ``scan(stage, xs)``."""
    tx = optimizer(name)

    def init(seed=0):
        params = parameters(seed)
        return Stage(params, tx.init(params))

    def step(stage, x):
        x, bad = x
        # The loop mends what has exploded, and goes on.
        params = jax.tree.map(
            lambda p: jnp.where(jnp.isfinite(p), p, jnp.asarray(0.5, p.dtype)), stage.params
        )
        grads = jax.tree.map(lambda p: jnp.sin(p) * x.astype(p.dtype), params)
        updates, state = tx.update(grads, stage.state, params, bad=bad)
        return Stage(optax.apply_updates(params, updates), state)

    @jax.jit
    def scan(stage, xs):
        return jax.lax.scan(lambda stage, x: (step(stage, x), None), stage, xs)[0]

    return init, jax.jit(step), scan


def inputs(updates=UPDATES):
    """What each update is made of: a number for the gradients, and whether they explode."""
    numbers = np.random.default_rng(1).standard_normal(updates).astype(np.float32)
    update = np.arange(1, updates + 1)
    bad = np.isin(update % UPDATES, BAD)
    return jnp.asarray(numbers), jnp.asarray(bad)


@functools.cache
def stages(name):
    """The uninterrupted run: what there is before the first update, and after each."""
    init, step, _ = functions(name)
    run = [init()]
    for x in zip(*inputs(), strict=True):
        run.append(step(run[-1], x))
    return run


def uninterrupted(name, updates):
    """The end of a longer run."""
    init, step, _ = functions(name)
    stage = init()
    for x in zip(*inputs(updates), strict=True):
        stage = step(stage, x)
    return stage


def gone_on(name, stage, at):
    """The end of a run that goes on from the one after ``at`` updates."""
    step = functions(name)[1]
    xs = inputs()
    for place in range(at, UPDATES):
        stage = step(stage, (xs[0][place], xs[1][place]))
    return stage


def same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert (got.dtype, got.shape, got.tobytes()) == (
            wanted.dtype,
            wanted.shape,
            wanted.tobytes(),
        )
