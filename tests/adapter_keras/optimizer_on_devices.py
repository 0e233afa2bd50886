"""A SWAOptimizer on several devices, which a process must be started for; see the test."""

from __future__ import annotations

import keras
import numpy as np
from adapter_keras.small_models import Recorder, X, Y, array, compiled, same, weights

import swa_core
from swa_core import EMA, SWAConfig
from swa_keras import SWA, SWAOptimizer

CONFIG = SWAConfig(start="3step", every="2step", rule=EMA(0.9))


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def trained(optimizer, *callbacks, dtype=None):
    keras.utils.set_random_seed(7)
    policy = dtype and keras.dtype_policies.DTypePolicy(dtype)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, "tanh", dtype=policy, name="first"),
            keras.layers.Dense(1, name="last"),
        ]
    )
    recorder = Recorder()
    compiled(model, optimizer, auto_scale_loss=False)
    callbacks = [recorder, *callbacks]
    model.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    return model, list(recorder.after.values())


def agrees(optimizer, recorded):
    state = swa_core.init(recorded[0])
    for after in recorded:
        state = swa_core.update(state, after, CONFIG.schedule(), CONFIG.rule)
    assert (optimizer.updates, optimizer.n_averaged) == (8, state.n_averaged) == (8, 3)
    for actual, expected in zip(optimizer.averaged_weights, state.average, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def on_mirrored_replicas():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        _, plain = trained(sgd())
        optimizer = SWAOptimizer(sgd(), CONFIG)
        # Scaled by a power of two, gradients lose nothing.
        scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
        model, recorded = trained(scaled, SWA())
        for after, alone in zip(recorded, plain, strict=True):
            same(after, alone)
        agrees(optimizer, recorded)
        # The weights were finalized, and each replica has the same copy of all.
        for variable in [*optimizer.average.averages, *model.trainable_variables]:
            first, second = variable.value.values
            np.testing.assert_array_equal(first.numpy(), second.numpy())
        same(weights(model), optimizer.averaged_weights)


def on_sharded_weights():
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*first/kernel"] = (None, "model")
    layout[".*last/kernel"] = ("model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )
    for dtype in (None, "bfloat16"):
        optimizer = SWAOptimizer(sgd(), CONFIG)
        model, recorded = trained(optimizer, SWA(), dtype=dtype)
        recorded = [[np.asarray(leaf, np.float32) for leaf in after] for after in recorded]
        agrees(optimizer, recorded)
        averages = optimizer.average.averages
        assert {array(v).dtype for v in averages} == {np.dtype("float32")}
        for variable, average in zip(model.trainable_variables, averages, strict=True):
            ours = average.value.sharding
            assert ours.is_equivalent_to(variable.value.sharding, variable.ndim), average.path
        assert "model" in averages[0].value.sharding.spec


if __name__ == "__main__":
    on_mirrored_replicas() if keras.backend.backend() == "tensorflow" else on_sharded_weights()
    print("agreed")
