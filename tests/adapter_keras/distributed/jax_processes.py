"""``keras.distribution`` over two processes, of which each sees its own shards alone.

numpy cannot touch such arrays: jax raises where somebody tries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import keras
import numpy as np
import pytest
from adapter_keras.distributed.training import (
    BATCH,
    WHOLE,
    Data,
    X,
    Y,
    averages_are_the_cores,
    averaging,
    bn_data,
    network,
    of_every_update,
    resuming_is_bit_identical,
    same_as_on_one_device,
    statistics_are_those_of,
    swapping_gives_back_every_bit,
    trained,
)
from adapter_keras.small_models import array, everything, same, weights
from jax.experimental import multihost_utils

from swa_core import BatchNormError
from swa_keras import SWA, update_bn


@cache
def distribution(kind: str) -> Any:
    if kind == "data_parallel":
        return keras.distribution.DataParallel(auto_shard_dataset=False)
    # The shards of every kernel lie in both processes.
    devices = np.array(keras.distribution.list_devices()).reshape(2, 2).T
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*wide/kernel"] = (None, "model")
    layouts[".*wide/bias"] = ("model",)
    layouts[".*norm/.*"] = ("model",)
    layouts[".*narrow/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
    )


def data(kind: str) -> Data:
    """The share of this process: half of each batch, or all of it where each has all replicas."""
    if kind == "model_parallel":
        return WHOLE
    half = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    x, y = (whole.reshape(4, BATCH, -1)[:, half].reshape(16, -1) for whole in (X, Y))
    return Data(x, y, BATCH // 2)


@cache
def one_device() -> Any:
    return trained(network())


@cache
def run(kind: str) -> Any:
    return trained(network(), data(kind))


def told_alike(arrays: list[Any]) -> None:
    """That all processes hold the same."""
    for value in arrays:
        multihost_utils.assert_equal(value)


def check_averages_and_validation_are_those_of_one_device(kind: str) -> None:
    averages_are_the_cores(run(kind))
    with keras.distribution.distribution().scope():
        keras.distribution.set_distribution(None)
        one = one_device()
    same_as_on_one_device(run(kind), one)


def check_averages_stay_where_the_variables_are(kind: str) -> None:
    model, swa, *_ = run(kind)
    for average, variable in zip(swa._average._tensors, model.trainable_variables, strict=True):
        assert not variable.value.is_fully_addressable
        assert average.sharding == variable.value.sharding, variable.path
    wide = swa._average._tensors[0]
    assert wide.is_fully_replicated == (kind == "data_parallel")


def check_averaged_weights_are_gathered_whole_on_every_process(kind: str) -> None:
    swa = run(kind).swa
    assert [value.shape for value in swa.averaged_weights][:2] == [(4, 16), (16,)]
    told_alike(swa.averaged_weights)


def check_swapping_gives_back_every_bit(kind: str) -> None:
    swapping_gives_back_every_bit(run(kind), data(kind))


def check_a_resumed_training_is_bit_identical(kind: str) -> None:
    model = network()
    swa = resuming_is_bit_identical(run(kind), model, data(kind))
    for average, variable in zip(swa._average._tensors, model.trainable_variables, strict=True):
        assert average.sharding == variable.value.sharding, variable.path


def check_one_file_is_written_by_all_and_read_by_all(kind: str) -> None:
    swa, path = run(kind).swa, f"{kind}.safetensors"
    swa.save(path)
    multihost_utils.sync_global_devices("written")
    fresh = SWA.load(path, bn_data=(X,))
    fresh.set_model(network())
    same(fresh.averaged_weights, swa.averaged_weights)
    fresh.finalize()
    same(weights(fresh.model), swa.averaged_weights)


def check_live_weights_saved_while_swapped_come_back(kind: str) -> None:
    model, swa, *_ = run(kind)
    before = everything(model)
    with swa.averaged():
        state = swa.state_dict()
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    fresh = averaging()
    fresh.set_model(model)
    fresh.load_state_dict(state)
    same(everything(model), before)


def check_a_bad_shard_of_one_process_is_left_out_by_all(kind: str) -> None:
    model, swa = network(), of_every_update()
    swa.update(model)
    first = swa.averaged_weights
    kernel = array(model.trainable_variables[0])
    kernel[3, 15] = np.inf  # which under a layout map the second process holds alone
    model.trainable_variables[0].assign(kernel)
    swa.update(model)
    assert (swa.n_averaged, swa.n_skipped) == (1, 1)
    same(swa.averaged_weights, first)


def check_update_bn_pools_what_all_processes_have(kind: str) -> None:
    model = network()
    update_bn(model, bn_data(data(kind)))
    statistics_are_those_of(model, X)
    told_alike([array(v) for v in model.get_layer("norm").variables])


def check_a_batch_that_cannot_be_cut_is_refused_and_changes_nothing(kind: str) -> None:
    model = network()
    before = [array(v) for v in model.variables]
    with pytest.raises(BatchNormError, match="a batch of 3 on each of 2 processes"):
        update_bn(model, X[:3])
    same([array(v) for v in model.variables], before)


def check_a_finalized_model_holds_the_average(kind: str) -> None:
    model, swa, *_ = run(kind)
    swa.finalize()
    same(weights(model), swa.averaged_weights)
    told_alike(weights(model))


def within(kind: str, check: Callable[[str], None]) -> None:
    with distribution(kind).scope():
        check(kind)


CHECKS = {
    f"{kind}-{name.removeprefix('check_')}": partial(within, kind, check)
    for kind in ("data_parallel", "model_parallel")
    for name, check in list(globals().items())
    if name.startswith("check_")
}
