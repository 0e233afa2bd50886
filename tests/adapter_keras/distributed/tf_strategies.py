"""``tf.distribute`` and pinned devices, on two logical CPUs."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from adapter_keras.distributed.training import (
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
)
from adapter_keras.small_models import array, close, everything, same, weights

from swa_keras import SWA, update_bn

DROPOUT = 0.2


@cache
def strategy() -> Any:
    return tf.distribute.MirroredStrategy(["CPU:1", "CPU:0"])


def mirrored(**arguments: Any) -> Any:
    """As Keras' guide has it: the model is made inside the scope, and trained outside."""
    with strategy().scope():
        return network(**arguments)


@cache
def run() -> Any:
    return trained(mirrored(dropout=DROPOUT))


def replicas(variable: Any) -> list[np.ndarray]:
    return [copy.numpy() for copy in strategy().experimental_local_results(variable.value)]


def all_replicas(model: Any) -> list[np.ndarray]:
    """The values of the model on one device after the other."""
    pairs = [replicas(variable) for variable in model.variables]
    assert {len(pair) for pair in pairs} == {2}
    return [*(first for first, _ in pairs), *(second for _, second in pairs)]


def trained_on(model: Any) -> list[np.ndarray]:
    """The trained weights, which are the same on every device."""
    pairs = [replicas(variable) for variable in model.trainable_variables]
    same([first for first, _ in pairs], [second for _, second in pairs])
    return [second for _, second in pairs]


def of_both_replicas_alike(model: Any) -> None:
    for variable in model.variables:
        np.testing.assert_array_equal(*replicas(variable), err_msg=variable.path)


def devices(tensors: Any) -> set[str]:
    return {tensor.device.split("device:")[-1] for tensor in tensors}


def is_one(average: Any) -> bool:
    """Whether it lies on one device, as a variable and not a copy on each replica."""
    return isinstance(average, tf.Variable) and not isinstance(
        average, tf.distribute.DistributedValues
    )


def check_mirrored_averages_are_the_cores() -> None:
    averages_are_the_cores(run())


def check_mirrored_averages_and_validation_are_those_of_one_device() -> None:
    same_as_on_one_device(trained(mirrored(synchronized=True)), trained(network()))


def check_mirrored_the_training_is_bit_identical_to_one_without() -> None:
    plain = mirrored(dropout=DROPOUT)
    train(plain)
    same(all_replicas(run().model), all_replicas(plain))
    same(everything(run().model), everything(plain))


def check_mirrored_averages_lie_on_the_first_replica_alone() -> None:
    averages = run().swa._average._tensors
    assert all(map(is_one, averages))
    assert devices(averages) == {"CPU:1"}


def check_mirrored_averages_made_inside_the_scope_do_so_too() -> None:
    model, swa = mirrored(), of_every_update()
    with strategy().scope():
        swa.update(model)
        first = weights(model)
        for variable in model.trainable_variables:
            variable.assign_add(keras.ops.ones_like(variable))
        swa.update(model)
        averages = swa._average._tensors
        assert all(map(is_one, averages))
        assert devices(averages) == {"CPU:1"}
        close(swa.averaged_weights, [value + 0.5 for value in first])
        with swa.averaged():
            same(trained_on(model), swa.averaged_weights)
        fresh = of_every_update()
        fresh.set_model(model)
        fresh.load_state_dict(swa.state_dict())
        assert all(map(is_one, fresh._average._tensors))
        assert devices(fresh._average._tensors) == {"CPU:1"}


def check_mirrored_half_precision_is_averaged_in_float32() -> None:
    model, swa = mirrored(policy="bfloat16"), of_every_update()
    swa.update(model)
    swa.update(model)
    assert model.trainable_variables[0].dtype == "bfloat16"
    assert {average.dtype for average in swa._average._tensors} == {tf.float32}
    same([w.astype("float32") for w in weights(model)], swa.averaged_weights)


def check_mirrored_swapping_reaches_every_replica_and_gives_back_every_bit() -> None:
    model, swa, *_ = run()
    assert any(not np.array_equal(*replicas(v)) for v in model.get_layer("norm").variables)
    before = all_replicas(model)
    with swa.averaged():
        same(trained_on(model), swa.averaged_weights)
    same(all_replicas(model), before)
    swapping_gives_back_every_bit(run())
    same(all_replicas(model), before)


def check_mirrored_a_resumed_training_is_bit_identical() -> None:
    swa = resuming_is_bit_identical(run(), mirrored(dropout=DROPOUT))
    assert all(map(is_one, swa._average._tensors))
    assert devices(swa._average._tensors) == {"CPU:1"}


def check_mirrored_live_weights_saved_while_swapped_come_back() -> None:
    model, swa, *_ = run()
    before = [replicas(variable)[0] for variable in model.variables]
    with swa.averaged():
        state = swa.state_dict()
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    fresh = averaging()
    fresh.set_model(model)
    fresh.load_state_dict(state)
    for variable, value in zip(model.variables, before, strict=True):
        same(replicas(variable), [value, value])


def check_mirrored_a_snapshot_with_nan_is_left_out() -> None:
    model, swa = mirrored(), of_every_update()
    swa.update(model)
    first = swa.averaged_weights
    kernel = array(model.trainable_variables[0])
    kernel[3, 15] = np.nan
    model.trainable_variables[0].assign(kernel)
    swa.update(model)
    assert (swa.n_averaged, swa.n_skipped) == (1, 1)
    same(swa.averaged_weights, first)


def check_mirrored_update_bn_pools_the_data_for_every_replica() -> None:
    """Synchronized or not, inside the scope or outside; also of a ragged last batch."""
    for synchronized in (False, True):
        model = mirrored(synchronized=synchronized)
        update_bn(model, X[:29], batch_size=8)
        statistics_are_those_of(model, X[:29])
        of_both_replicas_alike(model)
        model = mirrored(synchronized=synchronized)
        with strategy().scope():
            update_bn(model, X[:29], batch_size=8)
        statistics_are_those_of(model, X[:29])
        of_both_replicas_alike(model)


def check_synchronized_batch_norm_far_from_zero_costs_no_precision() -> None:
    data = (1000 + np.random.default_rng(3).normal(size=(64, 3))).astype("float32")
    with strategy().scope():
        layer = keras.layers.BatchNormalization(synchronized=True)
        model = keras.Sequential([keras.Input((3,)), layer])
    update_bn(model, data, batch_size=16)
    exact = data.astype("float64")
    np.testing.assert_allclose(array(layer.moving_mean), exact.mean(0), rtol=3e-7)
    np.testing.assert_allclose(array(layer.moving_variance), exact.var(0), rtol=1e-6)


def check_mirrored_a_finalized_model_holds_the_average_on_every_replica() -> None:
    model, swa, *_ = run()
    swa.finalize()
    same(trained_on(model), swa.averaged_weights)
    of_both_replicas_alike(model)


def check_averages_follow_a_strategy_of_one_device() -> None:
    with tf.distribute.OneDeviceStrategy("CPU:1").scope():
        model = network(dropout=DROPOUT)
    one = trained(model)
    averages_are_the_cores(one)
    assert devices(one.swa._average._tensors) == devices(v.value for v in model.variables)
    assert devices(one.swa._average._tensors) == {"CPU:1"}
    swapping_gives_back_every_bit(one)


def check_averages_follow_pinned_variables() -> None:
    with tf.device("CPU:1"):
        model = network()
    with tf.device("CPU:0"):
        model.add(keras.layers.Dense(2))
    expected = [tensor.value.device for tensor in model.trainable_variables]
    assert devices(v.value for v in model.trainable_variables) == {"CPU:0", "CPU:1"}
    swa = of_every_update()
    swa.update(model)
    for variable in model.trainable_variables:
        variable.assign(keras.ops.ones_like(variable))
    before = weights(model)
    swa.update(model)
    assert [average.device for average in swa._average._tensors] == expected
    with swa.averaged(model):
        same(weights(model), swa.averaged_weights)
        assert [tensor.value.device for tensor in model.trainable_variables] == expected
    same(weights(model), before)
    fresh = SWA({"start": "1step", "every": "1step"}, bn_data=(X,))
    fresh.set_model(model)
    fresh.load_state_dict(swa.state_dict())
    assert [average.device for average in fresh._average._tensors] == expected
    fresh.update(model)
    swa.update(model)
    same(fresh.averaged_weights, swa.averaged_weights)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
