"""``keras.distribution`` on eight devices of one process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import keras
import numpy as np
from adapter_keras.distributed.training import (
    BATCH,
    X,
    averages_are_the_cores,
    averaging,
    network,
    of_every_update,
    resuming_is_bit_identical,
    same_as_on_one_device,
    statistics_are_those_of,
    swapping_gives_back_every_bit,
    train,
    trained,
    variables_of,
)
from adapter_keras.small_models import array, everything, same, weights

from swa_keras import update_bn

DROPOUT = 0.2  # the same on any number of devices


@cache
def distribution(kind: str) -> Any:
    if kind == "data_parallel":
        return keras.distribution.DataParallel()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*wide/kernel"] = (None, "model")
    layouts[".*wide/bias"] = ("model",)
    layouts[".*norm/.*"] = ("model",)
    layouts[".*narrow/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


@cache
def one_device() -> Any:
    return trained(network(dropout=DROPOUT))


@cache
def run(kind: str) -> Any:
    return trained(network(dropout=DROPOUT))


def check_averages_are_the_cores(kind: str) -> None:
    averages_are_the_cores(run(kind))


def check_averages_and_validation_are_those_of_one_device(kind: str) -> None:
    with keras.distribution.distribution().scope():
        keras.distribution.set_distribution(None)
        one = one_device()
    same_as_on_one_device(run(kind), one)


def check_averages_are_sharded_as_the_variables(kind: str) -> None:
    model, swa, *_ = run(kind)
    averages = swa._average._tensors
    for average, variable in zip(averages, model.trainable_variables, strict=True):
        assert average.sharding == variable.value.sharding, variable.path
        assert len(average.sharding.device_set) == 8
    wide = averages[0].addressable_shards[0].data.shape
    assert wide == ((4, 4) if kind == "model_parallel" else (4, 16))


def check_swapping_and_layouts_come_back(kind: str) -> None:
    model = run(kind).model
    shardings = [variable.value.sharding for variable in variables_of(model)]
    swapping_gives_back_every_bit(run(kind))
    assert [variable.value.sharding for variable in variables_of(model)] == shardings
    with run(kind).swa.averaged():
        assert [v.value.sharding for v in variables_of(model)] == shardings


def check_the_training_is_bit_identical_to_one_without(kind: str) -> None:
    plain = network(dropout=DROPOUT)
    train(plain)
    same(everything(run(kind).model), everything(plain))


def check_a_resumed_training_is_bit_identical(kind: str) -> None:
    model = network(dropout=DROPOUT)
    swa = resuming_is_bit_identical(run(kind), model)
    for average, variable in zip(swa._average._tensors, model.trainable_variables, strict=True):
        assert average.sharding == variable.value.sharding, variable.path


def check_loaded_averages_lie_like_the_variables(kind: str) -> None:
    model, swa, *_ = run(kind)
    fresh = averaging()
    fresh.set_model(model)
    fresh.load_state_dict(swa.state_dict())
    for average, variable in zip(fresh._average._tensors, model.trainable_variables, strict=True):
        assert average.sharding == variable.value.sharding, variable.path
    same(fresh.averaged_weights, swa.averaged_weights)


def check_live_weights_saved_while_swapped_come_back(kind: str) -> None:
    model, swa, *_ = run(kind)
    before, shardings = everything(model), [v.value.sharding for v in variables_of(model)]
    with swa.averaged():
        state = swa.state_dict()
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    fresh = averaging()
    fresh.set_model(model)
    fresh.load_state_dict(state)
    same(everything(model), before)
    assert [v.value.sharding for v in variables_of(model)] == shardings


def check_one_bad_shard_leaves_the_snapshot_out(kind: str) -> None:
    model, swa = network(), of_every_update()
    swa.update(model)
    kernel = array(model.trainable_variables[0])
    first = [average.copy() for average in swa.averaged_weights]
    kernel[3, 15] = np.nan  # on the last device of the model axis alone
    model.trainable_variables[0].assign(kernel)
    swa.update(model)
    assert (swa.n_averaged, swa.n_skipped) == (1, 1)
    same(swa.averaged_weights, first)


def check_update_bn_pools_the_data_over_the_devices(kind: str) -> None:
    """Also of a last batch that cannot be cut for them."""
    model = network()
    state = [v.value.sharding for v in model.variables]
    update_bn(model, X[:28], batch_size=BATCH)
    statistics_are_those_of(model, X[:28])
    assert [v.value.sharding for v in model.variables] == state


def check_batches_are_cut_for_the_devices_as_in_fit(kind: str) -> None:
    model, seen = network(), []

    class Seen(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            jax.debug.inspect_array_sharding(inputs, callback=seen.append)
            return inputs

    update_bn(keras.Sequential([keras.Input((4,)), Seen(), *model.layers]), X, batch_size=BATCH)
    parts = 8 if kind == "data_parallel" else 2
    assert seen[0].shard_shape((BATCH, 4)) == (BATCH // parts, 4)


def check_averaging_is_compiled_once(kind: str) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        jax.clear_caches()
        model, swa = network(), of_every_update()
        with jax.log_compiles():
            for _ in range(4):
                swa.update(model)
    finally:
        logger.removeHandler(handler)
    compiled = [text for text in records if text.startswith("Finished XLA compilation of")]
    assert sum("lerp" in text for text in compiled) == 1, compiled
    assert sum("finite" in text for text in compiled) == 1, compiled


def check_a_finalized_model_keeps_its_layout_and_trains_on(kind: str) -> None:
    model, swa, *_ = run(kind)
    shardings = [variable.value.sharding for variable in variables_of(model)]
    swa.finalize()
    same(weights(model), swa.averaged_weights)
    assert [variable.value.sharding for variable in variables_of(model)] == shardings
    train(model, epochs=1)


def within(kind: str, check: Callable[[str], None]) -> None:
    with distribution(kind).scope():
        check(kind)


CHECKS = {
    f"{kind}-{name.removeprefix('check_')}": partial(within, kind, check)
    for kind in ("data_parallel", "model_parallel")
    for name, check in list(globals().items())
    if name.startswith("check_")
}
