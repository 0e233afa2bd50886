"""The average in the memory of the host, beside parameters in the device's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_optax import (
    accumulate,
    averaged_params,
    finalize,
    init,
    state_from_dict,
    state_to_dict,
    swa,
    wrap,
)

CONFIG = {"start": "2step", "every": "2step"}


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def trained(tx, n=5, donate=True, eager=False):
    def step(params, state, grad):
        updates, state = tx.update({"w": grad, "b": grad[0]}, state, params)
        return optax.apply_updates(params, updates), state

    step = step if eager else jax.jit(step, donate_argnums=(0, 1) if donate else ())
    # Arrays in a memory are committed to it, and what is computed with them is too. Inputs that are
    # not yet would be by the second step, and JAX would compile that one anew.
    params = jax.device_put({"w": jnp.arange(4.0), "b": jnp.zeros(())}, jax.devices()[0])
    state = tx.init(params) if eager else jax.jit(tx.init)(params)
    for place in range(n):
        params, state = step(params, state, jnp.full(4, 0.5 + place))
    if not eager:
        assert step._cache_size() == 1
    return params, state


@pytest.mark.parametrize("made", ["chain", "wrap"])
@pytest.mark.parametrize("eager", [False, True], ids=["jit", "eager"])
def test_the_average_waits_on_the_host_and_is_the_same(made, eager):
    def transformation(**where):
        if made == "wrap":
            return wrap(optax.sgd(0.1), CONFIG, **where)
        return optax.chain(optax.sgd(0.1), swa(CONFIG, **where))

    params, state = trained(transformation(memory_kind="pinned_host"), eager=eager)
    expected_params, expected = trained(transformation(), eager=eager)
    assert kinds(state[-1].average) == {"pinned_host"}
    assert kinds(params) == {"device"}
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted)
    for read in averaged_params, finalize:
        averaged = read(state, params)
        assert kinds(averaged) == {"device"}
        jax.tree.map(np.testing.assert_array_equal, averaged, read(expected, expected_params))
    compiled = jax.jit(averaged_params)(state, params)
    assert kinds(compiled) == {"device"}
    jax.tree.map(np.testing.assert_array_equal, compiled, averaged)


def test_a_scan_keeps_it_there():
    tx = swa({"start": "1step", "every": "1step"}, memory_kind="pinned_host")
    params = {"w": jnp.arange(4.0)}

    def step(carry, x):
        params, state = carry
        updates, state = tx.update({"w": jnp.full(4, x)}, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(3.0))[0], donate_argnums=0)
    params, state = run((params, tx.init(params)))
    assert kinds(state.average) == {"pinned_host"}
    np.testing.assert_allclose(state.average["w"], np.arange(4) + (0 + 1 + 3) / 3, rtol=1e-6)


def test_in_a_loop_of_ones_own():
    state = init({"w": jnp.zeros(3)}, memory_kind="pinned_host")
    for value in (1.0, 2.0):
        state = accumulate(state, {"w": jnp.full(3, value)})
    assert kinds(state.average) == {"pinned_host"}
    np.testing.assert_array_equal(state.average["w"], 1.5)


def test_init_inside_of_jit():
    tx = swa(CONFIG, memory_kind="pinned_host")
    state = jax.jit(tx.init)({"w": jnp.arange(4.0)})
    assert kinds(state.average) == {"pinned_host"}


def test_a_loaded_average_waits_there_too():
    tx = wrap(optax.sgd(0.1), CONFIG, memory_kind="pinned_host")
    params, state = trained(tx)
    loaded = state_from_dict(state_to_dict(state), tx.init(params))
    assert kinds(loaded[-1].average) == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, loaded[-1].average, state[-1].average)
