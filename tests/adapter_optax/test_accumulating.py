"""Averaging in a loop of one's own, by ``init`` and ``accumulate``."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import EMA, ConfigError, Polynomial, Schedule, StateError, StructureError, Uniform
from swa_core import init as core_init
from swa_core import update as core_update
from swa_optax import (
    accumulate,
    accumulating,
    averaged_params,
    finalize,
    init,
    n_averaged,
    n_skipped,
    state_from_dict,
    state_to_dict,
    swa,
)
from swa_optax.accumulating import _joined
from swa_optax.matching import parameters_now


def visited(n, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield {
            "kernel": jnp.asarray(rng.standard_normal((3, 4)), dtype),
            "steps": jnp.int32(3),
            "blocks": [jnp.asarray(rng.standard_normal(5), dtype), None],
        }


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.9), Polynomial(3)], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_it_is_the_transformation_due_at_every_update(rule, nonfinite):
    tx = swa({"start": "1step", "every": "1step", "rule": rule, "nonfinite": nonfinite})
    update = jax.jit(tx.update)
    first = next(visited(1))
    ours, theirs = init(first), tx.init(first)
    for params in visited(6):
        ours = accumulate(ours, params, rule=rule, nonfinite=nonfinite)
        nothing = jax.tree.map(jnp.zeros_like, params)
        _, theirs = update(nothing, theirs, params)
        # Adding an update of zero turns -0.0 into 0.0, of which there is none here.
        same_bits(ours, theirs)


def test_it_is_the_core():
    first = next(visited(1))
    ours = init(first)
    weights = jax.tree.map(np.asarray, first)
    core = core_init(weights)
    for params in visited(20):
        ours = accumulate(ours, params)
        core = core_update(core, jax.tree.map(np.asarray, params), Schedule(1, 1), Uniform())
    np.testing.assert_allclose(ours.average["kernel"], core.average["kernel"], rtol=1e-6, atol=1e-7)
    assert (int(ours.n_updates), int(ours.n_averaged)) == (20, 20)


@pytest.mark.parametrize("rule", ["uniform", {"name": "ema", "decay": 0.5}, EMA(0.5)], ids=str)
def test_rules_as_in_the_configuration(rule):
    state = init({"w": jnp.zeros(1)})
    for value in (1.0, 4.0):
        state = accumulate(state, {"w": jnp.array([value])}, rule=rule)
    assert float(state.average["w"][0]) == (2.5 if rule == "uniform" else 3.0)


def test_one_compilation_without_a_condition_and_with_all_of_the_average_donated():
    _joined.clear_cache()
    state = init(next(visited(1)))
    for params in visited(3):
        before = state.average
        state = accumulate(state, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        assert not params["kernel"].is_deleted()
    assert _joined._cache_size() == 1

    for nonfinite in ("keep", "skip"):
        text = _joined.lower(state, params, Uniform(), nonfinite).compile().as_text()
        # Under a condition is only the second look at weights whose sum is not finite.
        conditions = re.findall(r"= (.*?) conditional\(", text)
        assert conditions == ["(pred[])"] * (nonfinite == "skip")
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
        assert aliases.count("alias") == 4 + len(jax.tree.leaves(state.average))  # counters, leaves


def test_the_parameters_are_held_against_the_average_when_traced(monkeypatch):
    looked = []
    monkeypatch.setattr(
        accumulating,
        "parameters_now",
        lambda *arguments: looked.append(1) or parameters_now(*arguments),
    )
    _joined.clear_cache()
    state = init({"w": jnp.zeros(3)})
    for _ in range(3):
        state = accumulate(state, {"w": jnp.ones(3)})
    assert len(looked) == 1
    with pytest.raises(StructureError, match="'w'"):
        accumulate(state, {"w": jnp.ones(4)})
    assert n_averaged(accumulate(state, {"w": jnp.ones(3)})) == 4  # nothing was donated


def test_inside_of_a_scan_and_a_train_state_of_ones_own():
    def step(carry, x):
        params, average = carry
        params = params - 0.1 * (params - x)
        return (params, accumulate(average, params, rule=EMA(0.9))), params

    params = jnp.zeros(3)
    xs = jnp.linspace(0, 1, 7)
    xs = jnp.broadcast_to(xs[:, None], (7, 3))
    (params, average), seen = jax.jit(lambda carry: jax.lax.scan(step, carry, xs))(
        (params, init(params))
    )
    weights = 0.9 ** np.arange(6, -1, -1)
    expected = (weights[:, None] * np.float64(seen)).sum(0) / weights.sum()
    np.testing.assert_allclose(averaged_params(average, params), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_snapshot_is_left_out_and_counted(bad):
    state = accumulate(init({"w": jnp.zeros(2)}), {"w": jnp.ones(2)})
    state = accumulate(state, {"w": jnp.array([bad, 5.0])})
    assert (n_averaged(state), n_skipped(state), int(state.n_updates)) == (1, 1, 2)
    same_bits(state.average, {"w": jnp.ones(2)})
    kept = accumulate(state, {"w": jnp.array([bad, 5.0])}, nonfinite="keep")
    assert not np.isfinite(kept.average["w"][0])
    assert (n_averaged(kept), float(kept.average["w"][1])) == (2, 3.0)


def test_half_precision_is_averaged_in_float32():
    state = init({"w": jnp.zeros(1, jnp.bfloat16)})
    for value in (1.0, 1.0078125):  # neighbours in bfloat16
        state = accumulate(state, {"w": jnp.array([value], jnp.bfloat16)})
    assert state.average["w"].dtype == jnp.float32
    assert float(state.average["w"][0]) == 1.00390625
    assert finalize(state, {"w": jnp.zeros(1, jnp.bfloat16)})["w"].dtype == jnp.bfloat16


def test_saved_and_loaded_as_any_state():
    state = init(next(visited(1)))
    for params in visited(3):
        state = accumulate(state, params)
    loaded = state_from_dict(state_to_dict(state), init(params))
    for params in visited(2, seed=1):
        state, loaded = accumulate(state, params), accumulate(loaded, params)
    same_bits(state, loaded)


def test_the_state_of_an_optimizer_goes_on_in_a_loop():
    tx = optax.chain(optax.sgd(1.0), swa({"start": "1step", "every": "1step"}))
    params = {"w": jnp.zeros(1)}
    _, state = tx.update({"w": -jnp.ones(1)}, tx.init(params), params)
    average = accumulate(state, {"w": jnp.array([4.0])})
    assert float(average.average["w"][0]) == 2.5


def test_bad_input():
    state = init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match='nonfinite must be "skip" or "keep"'):
        accumulate(state, {"w": jnp.zeros(2)}, nonfinite="drop")
    with pytest.raises(ConfigError, match=r"rule"):
        accumulate(state, {"w": jnp.zeros(2)}, rule="mean")
    with pytest.raises(StructureError, match=r"leaf 'w' has shape \(3,\)"):
        accumulate(state, {"w": jnp.zeros(3)})
    with pytest.raises(StructureError, match="leaf 'v'"):
        accumulate(state, {"w": jnp.zeros(2), "v": jnp.zeros(2)})
    with pytest.raises(StructureError, match=r"the order is accumulate\(state, params\)"):
        accumulate({"w": jnp.zeros(2)}, state)
    with pytest.raises(StateError, match="holds no average"):
        accumulate({"w": jnp.zeros(2)}, {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match='memory_kind must be "pinned_host" or None'):
        init({"w": jnp.zeros(2)}, memory_kind="unpinned_host")
    assert not state.average["w"].is_deleted()  # nothing was half-done
