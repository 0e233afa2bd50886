"""Bad input: what was wrong, where, and what to do about it; at trace time, with nothing lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import ConfigError, StructureError, SWAConfig
from swa_optax import averaged_params, swa, swa_lr
from swa_optax.paths import leaves

EVERY = SWAConfig(start="1step", every="1step")
PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_without_params(wrap):
    tx = optax.chain(optax.sgd(0.1), swa(EVERY))
    with pytest.raises(StructureError, match="without the parameters") as error:
        wrap(tx.update)(ZERO, tx.init(PARAMS))
    assert "Hint: call tx.update(grads, state, params), and put swa last" in str(error.value)


CHANGES = {
    "shape": (
        {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}},
        "'dense/kernel' has shape",
    ),
    "missing": ({"dense": {"kernel": jnp.ones((2, 3))}}, "'dense/bias' is missing"),
    "renamed": (
        {"dense": {"kernel": jnp.ones((2, 3)), "offset": jnp.ones(3)}},
        "'dense/bias' is missing",
    ),
    "list": ({"dense": [jnp.ones(3), jnp.ones((2, 3))]}, "'dense/bias' is missing"),
    "none": ({"dense": {"kernel": jnp.ones((2, 3)), "bias": None}}, "'dense/bias' is missing"),
    "new": (PARAMS | {"head": jnp.ones(1)}, "'head'"),
    "integer": (
        {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3, jnp.int32)}},
        "'dense/bias' has dtype int32",
    ),
    "wider": (
        {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3, jnp.complex64)}},
        "'dense/bias' has dtype complex64",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_are_refused_when_traced(change):
    tx = swa(SWAConfig(start="100step", every="1step"))  # also far from any snapshot
    state, (params, message) = tx.init(PARAMS), CHANGES[change]
    updates = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(StructureError, match=message):
        jax.eval_shape(tx.update, updates, state, params)
    tx.update(ZERO, state, PARAMS)


def test_an_array_that_became_something_else_is_refused_with_its_path():
    for leaf in (jax.nn.relu, "float32", np.array(["relu"]), object()):
        params = {"dense": PARAMS["dense"] | {"bias": leaf}}
        for use in (averaged_params, lambda state, params: swa(EVERY).update(ZERO, state, params)):
            with pytest.raises(StructureError, match="'dense/bias'"):
                use(swa(EVERY).init(PARAMS), params)
        with pytest.raises(StructureError, match=rf"\(.* is {type(leaf).__name__}\)"):
            swa(EVERY).init(leaf)


INTEGERS = {"step": jnp.array(3), "seed": jax.random.key(0), "mask": jnp.ones(2, bool)}


@pytest.mark.parametrize("init", [lambda f, x: f(x), jax.eval_shape], ids=["eager", "traced"])
def test_parameters_that_cannot_be_averaged_are_refused(init):
    tx = optax.chain(optax.sgd(0.1), swa(EVERY))
    with pytest.raises(StructureError, match="nothing can be averaged: none of the") as error:
        init(tx.init, INTEGERS)
    assert "('mask' is bool, 'seed' is key<fry>, 'step' is int32)" in str(error.value)
    with pytest.raises(StructureError, match=r"'0' is int32, '1' is int32, '2' is int32, ...\)"):
        init(tx.init, [jnp.array(1)] * 4)


def test_masked_trees_of_integers_pass():
    params = {"w": jnp.ones(2), "step": jnp.array(3)}
    mask = {"w": True, "step": False}
    state = optax.masked(swa(EVERY), mask).init(params)
    assert list(map(str, leaves(state.inner_state.average))) == ["w"]
    optax.masked(swa(EVERY), {"w": False, "step": False}).init(params)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"dense": [jnp.zeros(3), jnp.zeros((2, 3))]}, "an update of leaf 'dense/0'"),
        (ZERO | {"head": jnp.zeros(1)}, "an update of leaf 'head'"),
        ({}, "no update of leaf 'dense/bias'"),
        ({"dense": {"bias": jnp.zeros(3)}}, "no update of leaf 'dense/kernel'"),
    ],
)
def test_updates_of_another_structure_are_refused(updates, message):
    # They would pass for updates that are not made, and the parameters before them be averaged.
    with pytest.raises(StructureError, match=message):
        swa(EVERY).update(updates, swa(EVERY).init(PARAMS), PARAMS)


@pytest.mark.parametrize("dense", [None, optax.MaskedNode(), {"kernel": None, "bias": None}])
def test_updates_that_are_not_made_pass(dense):
    state = swa(EVERY).init(PARAMS)
    _, state = swa(EVERY).update({"dense": dense}, state, PARAMS)
    np.testing.assert_array_equal(state.average["dense"]["bias"], 1)


def test_narrower_parameters_of_the_same_average_pass():
    # float32 to bfloat16 keeps the float32 average.
    tx = swa(EVERY)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, half), tx.init(PARAMS), half)
    assert state.average["dense"]["bias"].dtype == jnp.float32


def test_a_restored_state_of_other_shapes_is_refused():
    tx = swa(EVERY)
    restored = tx.init({"dense": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}})
    with pytest.raises(StructureError, match=r"'dense/kernel' has shape \(2, 3\).*holds \(2, 4\)"):
        jax.jit(tx.update)(ZERO, restored, PARAMS)


def test_updates_of_other_shapes_are_refused():
    tx = swa(EVERY)
    updates = {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(())}}
    with pytest.raises(StructureError, match="its update has"):
        tx.update(updates, tx.init(PARAMS), PARAMS)


def test_traced_lengths_are_refused_with_their_names():
    def init(steps_per_epoch, total_steps):
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        return swa({"start": "50%"}, **lengths).init(PARAMS)

    with pytest.raises(ConfigError, match=r"(?s)2 faults.*steps_per_epoch: is traced.*static_argn"):
        jax.jit(init)(2, 10)
    jax.jit(init, static_argnums=(0, 1))(2, 10)
    with pytest.raises(ConfigError, match="steps_per_epoch: is traced"):
        jax.jit(lambda n: swa_lr(0.1, EVERY, steps_per_epoch=n)(0))(3)


def test_inject_hyperparams_is_told_of_static_args():
    tx = optax.inject_hyperparams(swa)(SWAConfig(start="1ep"), steps_per_epoch=3)
    with pytest.raises(ConfigError, match=r"static_args of optax.inject_hyperparams"):
        jax.jit(tx.update)(ZERO, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("config", "lengths", "message"),
    [
        ({"start": "1ep"}, {}, "steps_per_epoch is needed"),
        ({"start": "50%", "every": "1step"}, {}, "total_steps is needed"),
        ({"evry": "1ep"}, {}, 'Did you mean "every"'),
        (
            {"start": "9step", "every": "1step"},
            {"total_steps": 5},
            "before the first snapshot at 9",
        ),
        (
            {"start": "3000000000step", "every": "1step"},
            {},
            "swa.start: update 3000000000 is later",
        ),
        (
            {"start": "1step", "every": "1step", "stop": "3000000000step"},
            {},
            "swa.stop: update 3000000000 is later",
        ),
        ({"start": "1ep"}, {"steps_per_epoch": 2.5}, "whole number"),
    ],
)
@pytest.mark.parametrize("make", [swa, lambda *a, **k: swa_lr(0.1, *a, **k)], ids=["swa", "swa_lr"])
def test_configurations_that_cannot_be_used(make, config, lengths, message):
    with pytest.raises(ConfigError, match=message):
        make(config, **lengths)


def test_a_configuration_of_another_kind():
    with pytest.raises(TypeError, match="SWAConfig, a mapping or the path"):
        swa(3)
