"""NaN and Inf: found wherever they are and left out, or let through on request."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import EMA, SWAConfig
from swa_optax import accumulate, init, swa

BADS = (np.nan, -np.nan, np.inf, -np.inf)
DTYPES = ("float32", "float16", "bfloat16", "complex64")


def config(**rest):
    return SWAConfig(start="1step", every="1step", rule=EMA(0.5), **rest)


def parameters():
    """Leaves of every kind: of several sizes, scalars, without elements, -0.0 among them."""
    leaves = {dtype: jnp.array([1, -0.0, 3], dtype) for dtype in DTYPES}
    scalars = {f"scalar {dtype}": jnp.array(-0.0, dtype) for dtype in DTYPES}
    empty = {"empty": jnp.zeros((0, 2)), "empty complex": jnp.zeros((2, 0), jnp.complex64)}
    kernel = {"kernel": jnp.arange(35.0).reshape(7, 5)}
    return leaves | scalars | empty | kernel | {"steps": jnp.array(3), "nothing": None}


def spoiled():
    """Every leaf with one bad element, in turn: (where, leaf name, parameters)."""
    good = parameters()
    for name, leaf in good.items():
        if leaf is None or leaf.size == 0 or leaf.dtype == np.int32:
            continue
        for place in {0, leaf.size - 1}:
            for value in BADS:
                parts = [value, complex(1, value), complex(value, 1)]
                for bad in parts if jnp.iscomplexobj(leaf) else parts[:1]:
                    flat = np.array(leaf).reshape(-1)
                    flat[place] = bad
                    yield (name, place, bad), good | {name: jnp.asarray(flat.reshape(leaf.shape))}


def bits(tree):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_one_bad_element_anywhere_leaves_everything_as_it_was():
    tx = swa(config())
    step = jax.jit(lambda state, params: tx.update(None, state, params)[1])
    state = step(tx.init(parameters()), parameters())
    assert int(state.n_averaged) == 1
    cases = list(spoiled())
    assert len(cases) == 80
    for where, params in cases:
        after = step(state, params)
        assert [int(count) for count in after[:3]] == [2, 1, 1], where
        assert bits(after[3:]) == bits(state[3:]), where


def test_a_loop_skips_the_same():
    state = accumulate(init(parameters()), parameters())
    before = bits(state[3:])
    for n, (_, params) in enumerate(list(spoiled())[::10], start=1):
        state = accumulate(state, params)
        assert [int(count) for count in state[:3]] == [n + 1, 1, n]
    assert bits(state[3:]) == before


@pytest.mark.parametrize("bad", BADS)
def test_keep_lets_it_through_where_it_is(bad):
    tx = swa(config(nonfinite="keep"))
    step = jax.jit(lambda state, params: tx.update(None, state, params)[1])
    state = step(tx.init(parameters()), parameters())
    good = parameters()
    state = step(state, good | {"kernel": good["kernel"].at[3, 3].set(bad)})
    kernel = np.asarray(state.average["kernel"])
    wrong = ~np.isfinite(kernel)
    assert wrong[3, 3]
    assert wrong.sum() == 1
    assert np.isnan(kernel[3, 3]) == np.isnan(bad)
    assert [int(count) for count in state[:3]] == [2, 2, 0]


def test_parameters_that_overflow_as_they_are_stored_are_left_out():
    # The update itself is finite.
    tx = swa(config())
    params = {"half": jnp.array([60000.0, 1.0], jnp.float16), "w": jnp.ones(2)}
    state = tx.init(params)
    small, large = (
        {"half": jnp.array([x, 0.0], jnp.float16), "w": jnp.zeros(2)} for x in (1000.0, 10000.0)
    )
    for update in (tx.update, jax.jit(tx.update)):
        _, after = update(small, state, params)
        assert [int(count) for count in after[:3]] == [1, 1, 0]
        _, skipped = update(large, after, params)
        assert np.isinf(np.asarray(optax.apply_updates(params, large)["half"][0]))
        assert [int(count) for count in skipped[:3]] == [2, 1, 1]
        assert bits(skipped[3:]) == bits(after[3:])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_finite_numbers_are_no_infinities(dtype):
    tx, largest = swa(config()), jnp.finfo(dtype).max
    params = {"w": jnp.array([largest, -largest], dtype)}
    _, state = jax.jit(tx.update)(None, tx.init(params), params)
    assert [int(count) for count in state[:3]] == [1, 1, 0]


def test_a_nan_of_eight_bits_is_found():
    tx = swa(config())
    params = {"w": jnp.array([1, np.nan], jnp.float8_e4m3fn)}
    _, state = jax.jit(tx.update)({"w": None}, tx.init(params), params)
    assert [int(count) for count in state[:3]] == [1, 0, 1]


def test_after_a_skipped_snapshot_it_goes_on_as_if_there_had_been_none():
    tx = swa(config())
    step = jax.jit(lambda state, params: tx.update(None, state, params)[1])
    scaled = [
        jax.tree.map(lambda p, k=k: p * jnp.asarray(k, p.dtype), parameters()) for k in (1, 2)
    ]
    with_bad = without = tx.init(parameters())
    bad = next(iter(spoiled()))[1]
    for params in (bad, scaled[0], bad, bad, scaled[1]):
        with_bad = step(with_bad, params)
        if params is not bad:
            without = step(without, params)
    assert bits(with_bad[3:]) == bits(without[3:])
    assert [int(count) for count in with_bad[:3]] == [5, 2, 3]


def test_what_is_not_due_is_neither_looked_at_nor_counted():
    tx = swa(SWAConfig(start="3step", every="3step"))
    params = {"w": jnp.array([np.nan, 1.0])}
    state = tx.init({"w": jnp.ones(2)})
    for _ in range(5):
        _, state = jax.jit(tx.update)(None, state, params)
    assert [int(count) for count in state[:3]] == [5, 0, 1]


def test_what_is_not_averaged_may_be_what_it_likes():
    # Masked and frozen parts, and what is no number.
    tx = optax.masked(swa(config()), {"w": True, "frozen": False})
    params = {"w": jnp.ones(2), "frozen": jnp.full(2, np.nan)}
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(zero, tx.init(params), params)
    assert [int(count) for count in state.inner_state[:3]] == [1, 1, 0]
