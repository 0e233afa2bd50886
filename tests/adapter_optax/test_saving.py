"""Interrupted and resumed, in every form in which a state is saved."""

from __future__ import annotations

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_core
from swa_core import EMA, Polynomial, StateError, StructureError, SWAConfig, Uniform
from swa_optax import n_averaged, state_from_dict, state_to_dict, swa

UPDATES = 7


def config(rule=EMA(0.9)):  # noqa: B008
    return SWAConfig(start="3step", every="2step", rule=rule)


def params_like(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)},
        "half": jnp.asarray(rng.standard_normal(3), jnp.bfloat16),
        "steps": jnp.array(0),
    }


def make(rule=EMA(0.9)):  # noqa: B008
    tx = optax.chain(optax.trace(0.9), optax.scale(-0.1), swa(config(rule)))

    @jax.jit
    def step(params, state, x):
        trainable = params | {"steps": None}
        grads = jax.tree.map(lambda leaf: jnp.sin(leaf) * x.astype(leaf.dtype), trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates) | {"steps": params["steps"] + 1}, state

    def init(params):
        return tx.init(params | {"steps": None})

    return init, step


def inputs():
    return jnp.asarray(np.random.default_rng(1).standard_normal(UPDATES), jnp.float32)


def same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(got).dtype == np.asarray(wanted).dtype
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def own_dict(state, fresh, settings):
    lengths = {"schedule": settings.schedule(), "rule": settings.rule}
    saved = state_to_dict(state, **lengths)
    others = jax.tree.map(np.array, state[:2])
    return (*others, state_from_dict(pickle.loads(pickle.dumps(saved)), fresh, **lengths)[2])


def core_dict(state, fresh, settings):
    saved = swa_core.state_to_dict(jax.tree.map(np.asarray, state[2]))
    weights = jax.tree.map(np.asarray, fresh[2].average)
    return (*state[:2], swa_core.state_from_dict(saved, weights))


FORMS = {
    "own dict": own_dict,
    "core's dict": core_dict,
    "pickle": lambda state, fresh, _: pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state))),
    "flax": lambda state, fresh, _: flax.serialization.from_bytes(
        fresh, flax.serialization.to_bytes(state)
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [Uniform(), EMA(0.9), Polynomial(eta=3)], ids=str)
def test_resumed_at_any_update_it_is_the_uninterrupted_run(form, rule):
    init, step = make(rule)
    params = params_like()
    state, stages = init(params), []
    for x in inputs():
        stages.append((params, state))
        params, state = step(params, state, x)
    for place, (before, saved) in enumerate(stages):
        now = jax.tree.map(jnp.array, before)
        resumed = FORMS[form](saved, init(params_like(1)), config(rule))
        for x in inputs()[place:]:
            now, resumed = step(now, resumed, x)
        same_bits((now, resumed), (params, state))
    assert n_averaged(state) == 3


def test_resuming_does_not_compile_again():
    init, step = make()
    params = params_like()
    _, state = step(params, init(params), inputs()[0])
    step(params, state_from_dict(state_to_dict(state), state), inputs()[1])
    assert step._cache_size() == 1


def test_the_dictionary_is_plain_and_the_cores():
    init, step = make()
    _, state = step(params_like(), init(params_like()), inputs()[0])
    saved = state_to_dict(state, schedule=config().schedule(), rule=EMA(0.9))
    assert saved["version"] == 1
    assert {name: type(saved[name]) for name in ("n_updates", "n_averaged", "total")} == {
        "n_updates": int,
        "n_averaged": int,
        "total": float,
    }
    assert list(saved["average"]) == ["dense/kernel", "half"]
    assert all(type(leaf) is np.ndarray for leaf in saved["average"].values())
    weights = {"dense": {"kernel": np.zeros((2, 3), "f4")}, "half": np.zeros(3, "f4")}
    loaded = swa_core.state_from_dict(saved, weights, rule=EMA(0.9))
    assert loaded.updates == 1


def test_what_was_saved_shares_nothing_with_the_run():
    state = swa(config()).init({"w": jnp.ones(3)})
    saved = state_to_dict(state)
    saved["average"]["w"][:] = 7
    assert state.average["w"].tolist() == [1, 1, 1]
    loaded = state_from_dict(saved, state)
    saved["average"]["w"][:] = 8
    assert loaded.average["w"].tolist() == [7, 7, 7]


def test_any_nesting_and_any_pytree():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), swa(config())), 2)
    params = optax.chain(optax.sgd(0.1, momentum=0.9)).init({"w": jnp.ones(2)})  # NamedTuples
    state = tx.init(params)
    saved = state_to_dict(state) | {"n_updates": 5, "n_averaged": 1, "total": 1.0}
    loaded = state_from_dict(saved, state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert int(optax.tree.get(loaded, "n_updates")) == 5
    assert [leaf.dtype for leaf in jax.tree.leaves(loaded)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]


def test_the_sharding_comes_back():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    named = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = swa(config()).init({"w": jax.device_put(jnp.ones(2), named)})
    assert state_from_dict(state_to_dict(state), state).average["w"].sharding == named


def saved_state(**changes):
    lengths = {"schedule": config().schedule(), "rule": EMA(0.9)}
    return state_to_dict(swa(config()).init({"w": jnp.ones(2)}), **lengths) | changes


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "no version"),
        (saved_state(version=2), "version 2"),
        ({k: v for k, v in saved_state().items() if k != "n_averaged"}, "n_averaged missing"),
        ({k: v for k, v in saved_state().items() if k != "average"}, "arrays are missing"),
        (saved_state(schedule=[1, 1, None]), "schedule"),
        (saved_state(rule="uniform"), "rule"),
    ],
)
def test_a_bad_save_is_refused(saved, message):
    state = swa(config()).init({"w": jnp.ones(2)})
    with pytest.raises(StateError, match=message):
        state_from_dict(saved, state, schedule=config().schedule(), rule=EMA(0.9))


@pytest.mark.parametrize(
    ("params", "path"),
    [({"w": jnp.ones(3)}, "'w' has shape"), ({"v": jnp.ones(2)}, "'w' is missing|'v'")],
)
def test_a_save_of_other_parameters_is_refused(params, path):
    with pytest.raises(StructureError, match=path):
        state_from_dict(saved_state(), swa(config()).init(params))


def test_leaves_that_cannot_be_told_apart_are_refused():
    state = swa(config()).init({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(StateError, match="two leaves have the path 'a/b'"):
        state_to_dict(state)


def test_the_state_of_an_ensemble_is_refused():
    state = jax.vmap(swa(config()).init)({"w": jnp.ones((3, 2))})
    with pytest.raises(StateError, match="ensemble"):
        state_to_dict(state)
