"""The dictionary of a state: what it holds, and what is refused. (See also test_resuming.)"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_core
from swa_core import EMA, StateError, StructureError, SWAConfig
from swa_optax import state_from_dict, state_to_dict, swa


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
    return jnp.asarray(np.random.default_rng(1).standard_normal(7), jnp.float32)


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
