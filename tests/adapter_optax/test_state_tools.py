"""optax' tools for states on ours: tree.get, tree.set, map_params, cast and the like."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from adapter_optax.training import EVERY, assert_close, gradients, params_like, same_bits, train

from swa_core import StateError, SWAState
from swa_optax import averaged_params, n_averaged, swa, wrap

pytestmark = pytest.mark.usefixtures("relaxed_jax")

ADAM = optax.chain(optax.adam(0.1), swa(EVERY))


def started(tx, start=None):
    """A state with one snapshot in it, made eagerly and without compiling a step."""
    start = params_like() if start is None else start
    updates, state = tx.update(jax.tree.map(jnp.ones_like, start), tx.init(start), start)
    return optax.apply_updates(start, updates), state


NESTED = {
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(
            optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
            optax.apply_if_finite(optax.ema(0.9), 3),
            optax.scale_by_schedule(optax.constant_schedule(1.0)),
            swa(EVERY),
        ),
        2,
    ),
    "partition": lambda: optax.partition(
        {
            "a": optax.chain(optax.contrib.prodigy(0.1), swa(EVERY)),
            "b": optax.contrib.schedule_free_sgd(0.1),
        },
        {"dense": {"kernel": "a", "bias": "b"}},
    ),
    "lookahead": lambda: optax.chain(optax.lookahead(optax.adam(0.1), 2, 0.5), swa(EVERY)),
    "wrap": lambda: wrap(optax.MultiSteps(optax.lbfgs(0.1, linesearch=None), 2), EVERY),
    "monitored": lambda: optax.chain(
        optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}), ADAM
    ),
}


@pytest.mark.parametrize("case", NESTED)
def test_tree_get_and_set_find_each_field_once(case):
    start = params_like()
    if case == "lookahead":
        start = optax.LookaheadParams.init_synced(start)
    state = NESTED[case]().init(start)
    ours = optax.tree.get(state, "SWAState")
    assert isinstance(ours, SWAState)
    for field in SWAState._fields:
        ((path, value),) = optax.tree.get_all_with_path(state, field)
        assert "SWAState" in str(path[-1])
        assert value is getattr(ours, field)
    state = optax.tree.set(state, n_averaged=jnp.int32(5), total=jnp.float32(2))
    assert n_averaged(state) == 5
    assert float(optax.tree.get(state, "total")) == 2
    # The trouble that names of our own avoid.
    if case == "MultiSteps":
        with pytest.raises(KeyError):
            optax.tree.get(state, "count")


def test_no_state_of_optax_has_a_field_of_ours():
    taken = {
        field
        for module in (optax, optax.contrib)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        for field in getattr(kind, "_fields", ())
    }
    assert len(taken) > 60
    assert not taken & set(SWAState._fields)


def test_tree_set_of_the_average_starts_from_another_one():
    params, state = started(ADAM)
    other = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), params)
    state = optax.tree.set(state, average=other)
    same_bits(averaged_params(state, params), other)


def test_map_params_finds_the_average():
    params, state = started(ADAM)
    doubled = optax.tree.map_params(ADAM, lambda leaf: 2 * leaf + 1, state)
    expected = jax.tree.map(lambda leaf: 2 * leaf + 1, state[1].average)
    same_bits(doubled[1].average, expected)
    same_bits(doubled[1][:4], state[1][:4])
    specs = jax.tree.map(lambda leaf: f"spec of rank {leaf.ndim}", params)
    mapped = optax.tree.map_params(
        ADAM, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert mapped[1] == SWAState(None, None, None, None, specs)


MAPPED = {
    "MultiSteps": lambda: optax.MultiSteps(ADAM, 2),
    "apply_if_finite": lambda: optax.apply_if_finite(ADAM, 2),
    "masked": lambda: optax.masked(ADAM, {"dense": {"kernel": True, "bias": False}}),
    "inject": lambda: optax.inject_hyperparams(lambda r: optax.chain(optax.sgd(r), swa(EVERY)))(
        1.0
    ),
    "named": lambda: optax.named_chain(("z", optax.sgd(0.1)), ("a", swa(EVERY))),
    "wrap": lambda: wrap(optax.adam(0.1), EVERY),
    "condition": lambda: optax.conditionally_mask(ADAM, lambda step: step >= 0),
}


@pytest.mark.parametrize("case", MAPPED)
def test_map_params_through_wrappers(case):
    tx = MAPPED[case]()
    state = tx.init(params_like())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    expected = jax.tree.map(lambda leaf: leaf + 1, optax.tree.get(state, "average"))
    same_bits(optax.tree.get(mapped, "average"), expected)
    assert int(optax.tree.get(mapped, "n_updates")) == 0


def test_map_params_beside_leaves_that_are_not_averaged():
    tx = swa(EVERY)
    params = {"w": jnp.ones(2), "steps": jnp.array(3)}
    mapped = optax.tree.map_params(
        tx,
        lambda average, spec: None if average is None else spec,
        tx.init(params),
        {"w": "spec", "steps": "other"},
        is_leaf=lambda leaf: leaf is None,
    )
    assert mapped.average == {"w": "spec", "steps": None}


def test_a_state_that_was_cast_is_refused_and_an_average_cast_back_goes_on():
    params, state = started(ADAM)
    half = optax.tree.cast(state, jnp.bfloat16)  # meant for gradients: counters become floats too
    with pytest.raises(StateError, match="was cast"):
        jax.eval_shape(ADAM.update, params, half, params)
    average = optax.tree.cast(half[1].average, jnp.float32)
    ADAM.update(params, optax.tree.set(state, average=average), params)


def test_arithmetic_and_norms_on_averages():
    params, state = started(ADAM)
    average = optax.tree.get(state, "average")
    assert float(optax.tree.norm(optax.tree.sub(average, params))) == 0
    assert_close(optax.tree.scale(2.0, average), optax.tree.add(params, params))
    assert optax.tree.dtype(average, "lowest") == jnp.float32
    assert jax.tree.structure(optax.tree.zeros_like(state)) == jax.tree.structure(state)


def test_incremental_update_from_a_read_average():
    # A hand-written average of averages takes what we read as any other tree.
    params, state = started(ADAM)
    mixed = optax.incremental_update(averaged_params(state, params), params, 0.5)
    assert_close(mixed, params)


def test_flattened_and_rebuilt_states_go_on_to_the_same_bits():
    start, grads = params_like(), list(gradients(4, params_like()))
    params, state, _ = train(ADAM, grads[:2], start)
    leaves, structure = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    step = jax.jit(ADAM.update)
    same_bits(step(grads[2], rebuilt, params), step(grads[2], state, params))
    assert step._cache_size() == 1
