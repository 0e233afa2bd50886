"""The transformation itself: what it averages, in which dtype, and what it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import EMA, Polynomial, SWAConfig, SWAState, Uniform
from swa_core import init as core_init
from swa_core import update as core_update
from swa_optax import averaged_params, n_averaged, n_skipped, swa

RULES = [Uniform(), EMA(0.9), EMA(half_life=3), Polynomial(eta=3)]


def config(start=3, every=2, **rest):
    return SWAConfig(start=f"{start}step", every=f"{every}step", **rest)


def params_like(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "kernel": jax.random.normal(keys[0], (3, 4), jnp.float32).astype(dtype),
        "bias": jax.random.normal(keys[1], (4,), jnp.float32).astype(dtype),
    }


def loss(params, x):
    bias = jnp.broadcast_to(params["bias"], (len(x), 4))
    return jnp.square(jnp.tanh(x @ params["kernel"] + bias)).sum()


def stepper(tx, **jit):
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit)


def inputs(n, dtype=jnp.float32, seed=7):
    return jax.random.normal(jax.random.key(seed), (n, 5, 3), jnp.float32).astype(dtype)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert (got.dtype, got.shape, got.tobytes()) == (
            wanted.dtype,
            wanted.shape,
            wanted.tobytes(),
        )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_follows_the_core_in_a_real_training(rule, x64):
    settings = config(rule=rule)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa(settings))
    step, params = stepper(tx), params_like()
    state, core = tx.init(params), core_init(host(params))
    for x in inputs(20):
        params, state = step(params, state, x)
        core = core_update(core, host(params), settings.schedule(), rule)
        ours = state[1]
        assert (int(ours.updates), int(ours.n_averaged)) == (core.updates, core.n_averaged)
        assert float(ours.total) == pytest.approx(core.total, rel=1e-6)
        for name, leaf in core.average.items():
            np.testing.assert_allclose(ours.average[name], leaf, rtol=3e-6, atol=5e-7)
    assert core.n_averaged == 9


def test_a_snapshot_is_the_very_parameters_of_the_training(relaxed_jax):
    # The compiler may fuse and round p + (-lr m) otherwise where it computes it a second time.
    for seed in range(5):
        tx, params = optax.chain(optax.adamw(0.1), swa(config(1, 1))), params_like()
        params, state = stepper(tx)(params, tx.init(params), inputs(1, seed=seed)[0])
        same_bits(state[1].average, params)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["kept", "donated"])
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_the_trajectory_is_that_without_averaging(relaxed_jax, optimizer, donate, nonfinite):
    averaging = optax.chain(optimizer, swa(config(1, 2, nonfinite=nonfinite)))
    ends = []
    for tx in (optimizer, averaging):
        params = params_like()
        state, step = tx.init(params), stepper(tx, donate_argnums=donate)
        for x in inputs(12):
            params, state = step(params, state, x)
        ends.append(host(params))
    same_bits(*ends)


def test_updates_pass_through_and_other_extra_arguments_too():
    tx = optax.chain(swa(config()), optax.scale_by_backtracking_linesearch(3))
    params = {"w": jnp.array([1.0, 2.0])}

    def value(params):
        return jnp.square(params["w"]).sum()

    state = tx.init(params)
    grads = jax.grad(value)(params)
    updates, _ = tx.update(grads, state, params, value=value(params), grad=grads, value_fn=value)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    updates = {"w": jnp.array([0.5, -0.0])}
    same_bits(swa(config()).update(updates, swa(config()).init(params), params)[0], updates)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "complex64"])
def test_averages_in_float32_or_wider(dtype, x64):
    tx, kept = swa(config(1, 1)), {"complex64": "complex64"}.get(dtype, "float32")
    params = {"w": jnp.array([1, 2, 3], dtype)}
    state = tx.init(params)
    assert state.average["w"].dtype == kept
    zero = {"w": jnp.zeros(3, dtype)}
    for value in (128, 128, 128, 144):
        params = {"w": jnp.full(3, value, dtype)}
        _, state = jax.jit(tx.update)(zero, state, params)
    assert state.average["w"].dtype == kept
    np.testing.assert_array_equal(state.average["w"], np.full(3, 132, kept))
    assert averaged_params(state, params)["w"].dtype == dtype


def test_float64_averages_in_float64():
    with jax.enable_x64(True):
        tx, third = swa(config(1, 1, rule=EMA(0.9))), np.float64(1) / 3
        params = {"w": jnp.full(2, third)}
        state = tx.init(params)
        for value in (third, 2 * third, third):
            _, state = jax.jit(tx.update)({"w": jnp.zeros(2)}, state, {"w": jnp.full(2, value)})
    expected = (0.81 + 2 * 0.9 + 1) / (0.81 + 0.9 + 1) / 3
    assert state.average["w"].dtype == np.float64
    np.testing.assert_allclose(state.average["w"], expected, rtol=1e-15)
    assert (state.total.dtype, state.updates.dtype) == (np.float32, np.int32)


def test_the_snapshot_is_rounded_as_optax_rounds_the_stored_parameters(relaxed_jax):
    # A float32 update on bfloat16 parameters: what is stored is the rounded sum.
    tx = swa(config(1, 1))
    params = {"w": jnp.array([1.0, 3.0], jnp.bfloat16)}
    updates = {"w": jnp.array([1e-4, 0.01], jnp.float32)}
    _, state = tx.update(updates, tx.init(params), params)
    stored = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.average["w"], stored["w"].astype(np.float32))


def test_the_first_snapshot_is_a_copy_to_the_bit():
    awkward = jnp.array([-0.0, 0.0, 1 / 3, 1e-30, -1e30, 16777217.0], jnp.float32)
    tx = swa(config(1, 1))
    for before in (3e38, -1e30, np.nan, np.inf):
        state = tx.init({"w": jnp.full_like(awkward, before)})
        for update in (tx.update, jax.jit(tx.update)):
            _, after = update({"w": jnp.full_like(awkward, -0.0)}, state, {"w": awkward})
            same_bits(after.average, {"w": awkward})


def test_integers_booleans_and_keys_are_none():
    params = {
        "w": jnp.ones(2),
        "steps": jnp.array(3),
        "mask": jnp.array([True]),
        "key": jax.random.key(0),
        "raw": jax.random.PRNGKey(0),
        "nothing": None,
        "host": np.ones(2, np.float32),
        "scalar": 0.5,
    }
    tx = swa(config(1, 1))
    state = tx.init(params)
    nones = {name for name, leaf in state.average.items() if leaf is None}
    assert nones == {"steps", "mask", "key", "raw", "nothing"}
    # What has no gradient has no update, or zeros.
    updates = jax.tree.map(jnp.zeros_like, params) | {"key": None, "mask": None}
    _, state = jax.jit(tx.update)(updates, state, params)
    assert {name for name, leaf in state.average.items() if leaf is None} == nones
    merged = averaged_params(state, params)
    assert merged["steps"] is params["steps"]
    assert merged["key"] is params["key"]
    assert merged["nothing"] is None


def test_a_leaf_without_an_update_stays_and_is_averaged():
    # Equinox gives None where nothing is trained.
    tx = swa(config(1, 1))
    params = {"trained": jnp.ones(2), "frozen": jnp.full(2, 5.0)}
    _, state = tx.update({"trained": jnp.ones(2), "frozen": None}, tx.init(params), params)
    same_bits(state.average, {"trained": jnp.full(2, 2.0), "frozen": jnp.full(2, 5.0)})


@pytest.mark.parametrize("tree", [{}, (), {"a": None}, optax.MaskedNode()], ids=str)
def test_empty_trees_pass(tree):
    tx = swa(config(1, 1))
    state = tx.init(tree)
    for _ in range(3):
        _, state = jax.jit(tx.update)(tree, state, tree)
    assert (int(state.updates), n_averaged(state)) == (3, 3)
    assert jax.tree.structure(averaged_params(state, tree)) == jax.tree.structure(tree)


def test_leaves_whose_printed_paths_meet_are_averaged_apart():
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.full(1, 2.0)}}
    tx = swa(config(1, 1))
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    same_bits(averaged_params(state, params), params)


def test_nan_and_inf_leave_the_average_and_are_counted():
    tx = swa(config(2, 2))
    state, zero = tx.init({"w": jnp.ones(3)}), {"w": jnp.zeros(3)}
    seen = [np.nan, 1, np.inf, np.inf, np.nan, 3, np.nan, -np.inf]
    for value in seen:
        params = {"w": jnp.array([0.0, value, 0.0], jnp.float32)}
        _, state = jax.jit(tx.update)(zero, state, params)
    assert (n_averaged(state), n_skipped(state)) == (2, 2)
    np.testing.assert_array_equal(state.average["w"], [0, 2, 0])
    assert float(state.total) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_in_every_dtype(dtype, bad):
    tx = swa(config(1, 1))
    params = {"good": jnp.ones(2), "w": jnp.array([1, bad], dtype), "empty": jnp.zeros((0, 2))}
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(zero, tx.init(params), params)
    assert (n_averaged(state), n_skipped(state)) == (0, 1)
    good = params | {"w": jnp.full(2, jnp.finfo(dtype).max, dtype)}
    _, state = jax.jit(tx.update)(zero, state, good)
    assert (n_averaged(state), n_skipped(state)) == (1, 1)


def test_nan_joins_on_request():
    tx = swa(config(1, 1, nonfinite="keep"))
    params = {"w": jnp.array([1.0, np.nan])}
    _, state = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_array_equal(state.average["w"], [1, np.nan])
    assert (n_averaged(state), n_skipped(state)) == (1, 0)


def test_counters_stay_at_their_end():
    tx, last = swa(config(1, 1)), 2**31 - 1
    params = {"w": jnp.ones(2)}
    state = tx.init(params)._replace(
        n_updates=jnp.int32(last - 1), n_averaged=jnp.int32(last - 1), n_skipped=jnp.int32(last)
    )
    for _ in range(3):
        _, state = jax.jit(tx.update)({"w": jnp.zeros(2)}, state, params)
    assert [int(leaf) for leaf in state[:3]] == [last, last, last]
    _, state = jax.jit(tx.update)({"w": jnp.full(2, np.nan)}, state, params)
    assert int(state.n_skipped) == last


def test_the_state_is_the_cores_and_its_fields_are_frozen():
    state = swa(config()).init({"w": jnp.ones(2)})
    assert type(state) is SWAState
    assert SWAState._fields == ("n_updates", "n_averaged", "n_skipped", "total", "average")
    dtypes = [leaf.dtype for leaf in state[:4]]
    assert dtypes == [np.int32, np.int32, np.int32, np.float32]
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_all_three_adapters_take_the_same_forms_of_configuration(tmp_path):
    settings = config(2, 3)
    settings.dump(tmp_path / "swa.toml")
    for form in (settings, settings.to_dict(), tmp_path / "swa.toml", str(tmp_path / "swa.toml")):
        tx = swa(form)
        state = tx.init({"w": jnp.ones(1)})
        for _ in range(5):
            _, state = tx.update({"w": jnp.ones(1)}, state, {"w": jnp.ones(1)})
        assert n_averaged(state) == 2
