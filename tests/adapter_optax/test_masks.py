"""Masked, partitioned and frozen parameters: what is not averaged is read from the live ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import (
    EVERY,
    assert_average,
    assert_close,
    gradients,
    mean,
    params_like,
    same_bits,
    train,
    trained,
)

from swa_core import StructureError, SWAConfig, SWAWarning
from swa_optax import averaged_params, finalize, n_averaged, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")

KERNEL = {"dense": {"kernel": True, "bias": False}}
FROZEN = jax.tree.map(lambda trained: not trained, KERNEL)
INNER = optax.chain(optax.adam(0.1), swa(EVERY))

MASKS = {
    "a tree": KERNEL,
    "of arrays": jax.tree.map(np.bool_, KERNEL),
    "a function": lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 2, tree),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_are_read_from_the_live_parameters(mask):
    tx = optax.chain(optax.sgd(0.1), optax.masked(swa(EVERY), MASKS[mask]))
    params, state, visited = trained(tx)
    for read in (averaged_params, finalize):
        merged = read(state, params)
        assert merged["dense"]["bias"] is params["dense"]["bias"]
        assert_close(merged["dense"]["kernel"], mean(visited)["dense"]["kernel"])
    inside = jax.jit(averaged_params)(state, params)
    same_bits(inside, merged)


def test_a_mask_for_a_whole_branch():
    start = params_like() | {"head": {"w": jnp.ones(2), "b": jnp.ones(())}}
    tx = optax.chain(optax.sgd(0.1), optax.masked(swa(EVERY), {"dense": False, "head": True}))
    params, state, visited = train(tx, gradients(4, start), start)
    merged = averaged_params(state, params)
    assert merged["dense"] == params["dense"]
    assert_close(merged["head"], mean(visited)["head"])


@pytest.mark.parametrize("mask", [True, False])
def test_all_or_nothing(mask):
    tx = optax.chain(optax.sgd(0.1), optax.masked(swa(EVERY), mask))
    params, state, visited = trained(tx)
    assert n_averaged(state) == 4
    if mask:
        assert_average(state, params, visited)
    else:
        same_bits(averaged_params(state, params), params)


def test_before_the_first_snapshot_a_mask_gives_the_live_parameters():
    tx = optax.masked(swa(SWAConfig(start="9step", every="1step")), KERNEL)
    params, state, _ = trained(tx, 1)
    with pytest.warns(SWAWarning, match="nothing is averaged yet"):
        assert averaged_params(state, params) is params


def test_merged_into_the_dtypes_of_the_live_parameters():
    start = {
        "half": jnp.ones(2, jnp.bfloat16),
        "masked": jnp.ones(2, jnp.float16),
        "steps": jnp.array(3),
        "none": None,
        "key": jax.random.key(0),
    }
    mask = {"half": True, "masked": False, "steps": True, "none": None, "key": True}
    tx = optax.masked(swa(EVERY), mask)
    updates = {"half": jnp.ones(2, jnp.bfloat16), "masked": jnp.zeros(2, jnp.float16)}
    updates |= {"steps": None, "none": None, "key": None}
    updates = updates | {"steps": jnp.array(0), "key": jnp.zeros(())}
    _, state = jax.jit(tx.update)(updates, tx.init(start), start)
    got = averaged_params(state, start)
    assert (got["half"].dtype, got["half"].tolist()) == (jnp.bfloat16, [2, 2])
    for name in ("masked", "steps", "none", "key"):
        assert got[name] is start[name]


def test_a_leaf_that_the_mask_lets_in_later_is_refused():
    # The mask is static for optax; a state of another mask would average with a hole.
    state = optax.masked(swa(EVERY), KERNEL).init(params_like())
    with pytest.raises(StructureError, match="'dense/bias' of dtype float32 is not in the"):
        jax.eval_shape(optax.masked(swa(EVERY), True).update, params_like(), state, params_like())


def test_partition_with_frozen_parameters():
    labels = {"dense": {"kernel": "trained", "bias": "frozen"}}
    tx = optax.partition({"trained": INNER, "frozen": optax.set_to_zero()}, labels)
    params, state, visited = trained(tx)
    assert_average(state, params, visited)
    assert averaged_params(state, params)["dense"]["bias"] is params["dense"]["bias"]


def test_partition_by_a_function_of_the_parameters_and_under_other_wrappers():
    def labels(tree):
        return jax.tree.map(lambda leaf: "trained" if leaf.ndim == 2 else "frozen", tree)

    partition = optax.partition({"trained": INNER, "frozen": optax.set_to_zero()}, labels)
    tx = optax.MultiSteps(optax.apply_if_finite(optax.chain(optax.clip(1.0), partition), 2), 2)
    params, state, visited = trained(tx)
    assert_average(state, params, visited[1::2])


def test_multi_transform_is_partition():
    assert optax.multi_transform is optax.partition


def test_behind_a_partition():
    labels = {"dense": {"kernel": "a", "bias": "b"}}
    tx = optax.chain(
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels), swa(EVERY)
    )
    params, state, visited = trained(tx)
    assert_average(state, params, visited)


def test_behind_freeze_what_is_frozen_is_averaged_to_itself():
    tx = optax.chain(optax.adam(0.1), optax.freeze(FROZEN), swa(EVERY))
    params, state, visited = trained(tx)
    assert_average(state, params, visited)
    same_bits(averaged_params(state, params)["dense"]["bias"], params_like()["dense"]["bias"])


def test_in_a_selective_transform_what_is_frozen_is_live():
    tx = optax.selective_transform(INNER, freeze_mask=FROZEN)
    params, state, visited = trained(tx)
    assert_average(state, params, visited)
    assert averaged_params(state, params)["dense"]["bias"] is params["dense"]["bias"]
