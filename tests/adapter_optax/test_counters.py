"""Counters in int32 that stay at their end, and the schedules that are near it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_optax import accumulate, init, state_from_dict, state_to_dict, swa
from swa_optax.counting import counted, increment

LAST = 2**31 - 1
PARAMS = {"w": jnp.array([5.0])}
BAD = {"w": jnp.array([jnp.nan])}


def config(start=1, every=1, **rest):
    return SWAConfig(start=f"{start}step", every=f"{every}step", **rest)


def counted_from(tx, n_updates, calls, params=PARAMS, **counts):
    """n_updates, n_averaged and n_skipped after each call."""
    state = tx.init(PARAMS)._replace(
        n_updates=jnp.int32(n_updates), **{name: jnp.int32(n) for name, n in counts.items()}
    )
    update, zero, seen = jax.jit(tx.update), {"w": jnp.zeros(1)}, []
    for _ in range(calls):
        state = update(zero, state, params)[1]
        assert [leaf.dtype for leaf in state[:3]] == [np.int32] * 3
        seen.append([int(count) for count in state[:3]])
    return seen


def test_a_schedule_near_the_end_is_kept_and_stops_with_the_counter():
    # Snapshots at LAST - 2 and LAST. What is not counted is none, for else all of it would be.
    seen = counted_from(swa(config(LAST - 2, 2)), LAST - 4, 7)
    assert [n for n, *_ in seen] == [LAST - 3, LAST - 2, LAST - 1, LAST, LAST, LAST, LAST]
    assert [n for _, n, _ in seen] == [0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_a_start_and_a_distance_of_the_last_number(nonfinite):
    tx = swa(config(LAST, LAST, nonfinite=nonfinite))
    assert [n for _, n, _ in counted_from(tx, LAST - 2, 4)] == [0, 1, 1, 1]
    assert [n for _, n, _ in counted_from(tx, 0, 2)] == [0, 0]
    tx = swa(config(1, 1, stop=f"{LAST}step", nonfinite=nonfinite))
    assert [n for _, n, _ in counted_from(tx, LAST - 2, 3)] == [1, 2, 2]


@pytest.mark.parametrize(
    "rule", [Uniform(), EMA(0.9), EMA(half_life=1e9), Polynomial(eta=3)], ids=str
)
def test_the_number_of_snapshots_stays_at_its_end_and_they_go_on(rule):
    tx = swa(config(rule=rule))
    assert [n for _, n, _ in counted_from(tx, 7, 3, n_averaged=LAST - 1)] == [LAST] * 3
    state = tx.init(PARAMS)._replace(n_averaged=jnp.int32(LAST))
    state = jax.jit(tx.update)({"w": jnp.zeros(1)}, state, {"w": jnp.array([-5.0])})[1]
    weight = rule.mixing_weight(float(LAST))
    np.testing.assert_allclose(state.average["w"], [5 - 10 * weight], rtol=1e-6)


def test_the_number_of_skipped_snapshots_stays_at_its_end():
    seen = counted_from(swa(config()), 7, 3, BAD, n_skipped=LAST - 1)
    assert [n for _, _, n in seen] == [LAST] * 3


@pytest.mark.parametrize("params", [PARAMS, BAD], ids=["good", "bad"])
def test_all_of_them_at_once_in_a_loop(params):
    last = {name: jnp.int32(LAST) for name in ("n_updates", "n_averaged", "n_skipped")}
    state = init(PARAMS)._replace(**last)
    for _ in range(2):
        state = accumulate(state, params)
    assert [int(count) for count in state[:3]] == [LAST] * 3


def test_counts_beyond_int32_are_loaded_as_the_last_one(tmp_path):
    fresh = swa(config()).init(PARAMS)
    saved = state_to_dict(fresh) | {"n_updates": 2**40, "n_averaged": 2**33, "total": 2.0**33}
    state = state_from_dict(saved, fresh)
    assert [int(count) for count in state[:3]] == [LAST, LAST, 0]
    assert float(state.total) == 2.0**33


@pytest.mark.parametrize("make", [int, np.int64, np.uint64, np.array, jnp.int32], ids=repr)
def test_counted(make, x64):
    assert counted(make(7)).dtype == np.int32
    assert int(counted(make(7))) == 7
    if make is not jnp.int32:
        assert int(counted(make(2**40))) == LAST
    assert int(counted(make(LAST))) == int(increment(counted(make(LAST)))) == LAST


def test_counted_of_traced_numbers(x64):
    wide = jnp.asarray([3, 2**31], jnp.uint32)
    assert jax.jit(jax.vmap(counted))(wide).tolist() == [3, LAST]
    assert jax.jit(counted)(3).weak_type is False
    if x64:
        assert jax.jit(jax.vmap(counted))(jnp.array([3, 2**40])).tolist() == [3, LAST]
    assert int(jax.jit(counted)(jnp.int8(3))) == 3
