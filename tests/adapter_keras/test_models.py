"""Models of every kind: what is averaged of them, what is given back, and what is refused."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, everything, fit, same

from swa_core import EMA, StructureError, SWAConfig, SWAWarning
from swa_keras import SWA
from swa_keras.model_state import averaged_variables, state_variables, synced

BACKEND = keras.backend.backend()
EVERY_STEP = {"start": "1step", "every": "1step"}
LAYERS = keras.layers


def sequential(*layers, **arguments):
    return keras.Sequential([keras.Input((4,)), *layers], **arguments)


def with_policy(name):
    def build():
        return sequential(LAYERS.Dense(5, "tanh", dtype=name), LAYERS.Dense(1, dtype=name))

    return build


def nested():
    inner = sequential(LAYERS.Dense(4, "tanh"), sequential(LAYERS.Dense(3)))
    inputs = keras.Input((4,))
    return keras.Model(inputs, LAYERS.Dense(1)(inner(inputs)))


class Subclassed(keras.Model):
    """With layers in a list and a dict, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = [LAYERS.Dense(4, "tanh"), LAYERS.Dense(4, "tanh")]
        self.heads = {"main": LAYERS.Dense(1)}

    def build(self, shape):
        for layer in (*self.blocks, self.heads["main"]):
            layer.build((None, 4))
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def call(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.scale * self.heads["main"](x)


def subclassed():
    model = Subclassed()
    model.build((None, 4))
    return model


def shared_layer():
    inputs = keras.Input((4,))
    dense = LAYERS.Dense(4, "tanh")
    return keras.Model(inputs, LAYERS.Dense(1)(dense(dense(inputs))))


def models_that_share_weights():
    inputs = keras.Input((4,))
    body = sequential(LAYERS.Dense(4, "tanh"))
    first = keras.Model(inputs, LAYERS.Dense(1)(body(inputs)), name="first")
    second = keras.Model(inputs, LAYERS.Dense(1)(body(inputs)), name="second")
    return keras.Model(inputs, LAYERS.Add()([first(inputs), second(inputs)]))


def tied_embedding():
    tied = LAYERS.ReversibleEmbedding(6, 3)
    inputs = keras.Input((4,))
    ids = LAYERS.Discretization([-1.0, -0.5, 0.0, 0.5, 1.0])(inputs)
    logits = tied(LAYERS.GlobalAveragePooling1D()(tied(ids)), reverse=True)
    return keras.Model(inputs, LAYERS.Dense(1)(logits))


def noisy():
    return sequential(LAYERS.GaussianNoise(0.1), LAYERS.Dropout(0.3), LAYERS.Dense(1))


def spectral():
    return sequential(LAYERS.SpectralNormalization(LAYERS.Dense(5, "tanh")), LAYERS.Dense(1))


def stateful():
    return keras.Sequential(
        [
            keras.Input(batch_shape=(6, 4)),
            LAYERS.Reshape((2, 2)),
            LAYERS.SimpleRNN(2, stateful=True),
            LAYERS.Dense(1),
        ]
    )


def frozen():
    model = sequential(LAYERS.Dense(4, "tanh"), LAYERS.Dense(3, "tanh"), LAYERS.Dense(1))
    model.layers[0].trainable = False
    return model


def quantised(model, mode):
    for layer in model.layers:  # model.quantize warns of layers without weights
        layer.quantize(mode)
    return model


def int8():
    return quantised(sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1)), "int8")


def int4():
    return quantised(sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1)), "int4")


def lora():
    model = sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1))
    model.layers[0].enable_lora(2)
    return model


def int8_with_lora():
    model = int8()
    model.layers[0].enable_lora(2)
    return model


def float8():
    return quantised(sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1)), "float8")


# Each model with the number of variables that are averaged.
MODELS = {
    "mixed bfloat16": (with_policy("mixed_bfloat16"), 4),
    "mixed float16": (with_policy("mixed_float16"), 4),
    "float16": (with_policy("float16"), 4),
    "float64": (with_policy("float64"), 4),
    "nested": (nested, 6),
    "subclassed": (subclassed, 7),
    "shared layer": (shared_layer, 4),
    "models that share weights": (models_that_share_weights, 6),
    "tied embedding": (tied_embedding, 3),
    "noise and dropout": (noisy, 2),
    "spectral normalization": (spectral, 4),
    "stateful RNN": (stateful, 5),
    "frozen layer": (frozen, 4),
    "int8": (int8, 2),
    "LoRA": (lora, 5),
    "int8 with LoRA": (int8_with_lora, 4),
    "float8": (float8, 4),
}
if BACKEND == "jax":
    del MODELS["float64"]  # which jax has only where the whole process is told to


class Snapshots(keras.callbacks.Callback):
    """What is averaged, after every update, in float64."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def on_train_batch_end(self, batch, logs=None):
        self.taken.append([array(v).astype("float64") for v in averaged_variables(self.model)])

    def mean(self):
        return [np.mean(values, axis=0) for values in zip(*self.taken, strict=True)]


def states_of(model):
    """The states of its RNNs, which are none of a model's variables."""
    return [array(v) for layer in model.layers for v in getattr(layer, "states", None) or ()]


def values_of(model):
    return [array(v) for v in averaged_variables(model)]


def made(build):
    keras.utils.set_random_seed(7)
    return compiled(build())


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.SGD(0.05), "mse")
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_average_is_that_of_the_snapshots_and_all_else_is_given_back(kind):
    build, number = MODELS[kind]
    model, swa, seen = made(build), SWA(EVERY_STEP, finalize=False, validate="raw"), Snapshots()
    with pytest.warns(SWAWarning, match="LoRA") if "LoRA" in kind else nullcontext():
        fit(model, swa, seen, epochs=2)
    assert swa.n_averaged == len(seen.taken) == 8
    averages = swa.averaged_weights
    assert len(averages) == number
    for average, mean in zip(averages, seen.mean(), strict=True):
        assert average.dtype == ("float64" if kind == "float64" else "float32")
        np.testing.assert_allclose(average, mean, rtol=3e-6, atol=1e-7)
    before = [*everything(model), *states_of(model)]
    with swa.averaged():
        for value, average in zip(values_of(model), averages, strict=True):
            np.testing.assert_array_equal(value, average.astype(value.dtype))
        for variable in state_variables(model):  # as a pass in training mode would
            variable.assign(array(variable) + 1)
    same([*everything(model), *states_of(model)], before)
    swa.finalize()
    for value, average in zip(values_of(model), averages, strict=True):
        np.testing.assert_array_equal(value, average.astype(value.dtype))


@pytest.mark.parametrize("kind", ["spectral normalization", "stateful RNN"])
def test_the_training_is_the_same_bit_for_bit(kind):
    build, _ = MODELS[kind]
    plain, model = made(build), made(build)
    arguments = {"epochs": 2, "validation_data": (X, Y), "validation_batch_size": 6}
    fit(plain, **arguments)
    # Not "average" alone: Keras' own validation moves the states of an RNN, and that is undone.
    fit(model, SWA(EVERY_STEP, finalize=False, validate="both"), **arguments)
    same(everything(model), everything(plain))
    same(states_of(model), states_of(plain))


def test_weights_at_rest_are_not_copied_at_every_swap():
    for build in (int8, int4, frozen, lora):
        model = build()
        assert not [v.path for v in state_variables(model) if v.path.endswith("kernel")]


# Half precision: where Keras' own averaging stands still


def test_a_bfloat16_model_is_averaged_in_float32_where_keras_own_average_is_bfloat16():
    config = SWAConfig(start="1step", every="1step", rule=EMA(0.999))
    model = made(with_policy("bfloat16"))
    model.optimizer.learning_rate = 1e-3
    swa, seen = SWA(config, finalize=False, validate="raw"), Snapshots()
    fit(model, swa, seen, epochs=5)
    shares = 0.999 ** np.arange(len(seen.taken))[::-1]
    for number, average in enumerate(swa.averaged_weights):
        kept = np.stack([snapshot[number] for snapshot in seen.taken])
        exact = np.tensordot(shares / shares.sum(), kept, 1)
        np.testing.assert_allclose(average, exact, rtol=1e-5, atol=1e-7)
    theirs = keras.optimizers.SGD(0.05, use_ema=True)
    theirs.build(model.trainable_variables)
    averages = [v for v in theirs.variables if "average" in v.path]
    assert {v.dtype for v in averages} == {"bfloat16"}


def test_batch_norm_is_recomputed_where_keras_own_averaging_keeps_the_trainings():
    def model(**arguments):
        layers = LAYERS.Dense(5), LAYERS.BatchNormalization(momentum=0.5), LAYERS.Dense(1)
        return compiled(sequential(*layers), keras.optimizers.SGD(0.05, **arguments))

    def gap(model):
        dense, norm = model.layers[:2]
        kernel, bias = map(array, (dense.kernel, dense.bias))
        exact = (X.astype("float64") @ kernel + bias).mean(0)
        return np.abs(array(norm.moving_mean) - exact).max()

    keras.utils.set_random_seed(7)
    theirs = model(use_ema=True, ema_momentum=0.9)
    fit(theirs)
    keras.utils.set_random_seed(7)
    ours = model()
    fit(ours, SWA({"start": "1ep", "rule": EMA(0.9), "every": "1step"}, bn_data=X))
    assert gap(ours) < 1e-6
    assert gap(theirs) > 1e-3


# Quantised layers and LoRA


def test_the_product_of_averaged_lora_factors_is_what_the_warning_says():
    model, swa = made(lora), SWA(EVERY_STEP, finalize=False, validate="raw")
    dense = model.layers[0]
    products = []

    def record(batch, logs):
        synced(model)
        products.append(array(dense.lora_kernel_a) @ array(dense.lora_kernel_b))

    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=record)
    path = dense.path
    with pytest.warns(SWAWarning, match=f"'{path}' trains LoRA.*is not the average of the prod"):
        fit(model, swa, recorder)
    fit(model, swa)  # said once
    with swa.averaged():
        product = array(dense.lora_kernel_a) @ array(dense.lora_kernel_b)
    assert np.abs(product - np.mean(products, axis=0)).max() > 1e-6


CHANGES = {
    "LoRA": lambda model: model.layers[0].enable_lora(2),
    "int8": lambda model: quantised(model, "int8"),
    "float8": lambda model: quantised(model, "float8"),
    "frozen": lambda model: setattr(model.layers[0], "trainable", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_after_a_snapshot_is_refused_with_the_path(change):
    model = made(lambda: sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1)))
    swa = SWA(EVERY_STEP)
    swa.update(model)
    averages = swa.averaged_weights
    CHANGES[change](model)
    if change == "float8":  # adds only what is not averaged
        swa.finalize(model)
        return
    before = everything(model)
    for use in (lambda: swa.update(model), lambda: swa.finalize(model)):
        with pytest.raises(StructureError, match=r"leaf '.*kernel") as error:
            use()
        assert "start a new average" in str(error.value)
    same(everything(model), before)
    same(swa.averaged_weights, averages)
    # The remedy: a new average for the new model.
    again = SWA(EVERY_STEP)
    with pytest.warns(SWAWarning, match="LoRA") if change == "LoRA" else nullcontext():
        again.update(model)
    same(again.averaged_weights, values_of(model))


def test_a_layer_that_is_unfrozen_between_fits_needs_a_new_average():
    model, swa = made(frozen), SWA(EVERY_STEP)
    fit(model, swa, epochs=1)
    model.layers[0].trainable = True
    compiled(model)
    with pytest.raises(StructureError, match=rf"leaf '{model.layers[0].path}/kernel'.*it is new"):
        fit(model, swa, epochs=1)
    again = SWA(EVERY_STEP)
    fit(model, again, epochs=1)
    assert len(again.averaged_weights) == 6


def test_a_finalized_model_is_quantised_like_any_other():
    model, swa = made(lambda: sequential(LAYERS.Dense(5, "tanh"), LAYERS.Dense(1))), SWA(EVERY_STEP)
    fit(model, swa, epochs=1)
    quantised(model, "int8")
    dense = model.layers[0]
    assert dense.kernel.dtype == "int8"
    kernel = array(dense.kernel) / array(dense.kernel_scale)
    np.testing.assert_allclose(kernel, swa.averaged_weights[0], atol=0.02)


def test_a_model_that_is_quantised_throughout_has_nothing_to_average():
    model = quantised(sequential(LAYERS.Dense(3, use_bias=False)), "int8")
    with pytest.raises(StructureError, match="no trainable floating-point weights"):
        SWA(EVERY_STEP).update(model)


# Loops of one's own


def step_of_tensorflow(model, optimizers, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = keras.ops.mean(keras.ops.square(model(x, training=True) - y))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for optimizer, part in zip(optimizers, halves(len(gradients)), strict=True):
        optimizer.apply(gradients[part], model.trainable_variables[part])


def step_of_torch(model, optimizers, x, y):
    import torch

    model.zero_grad()
    loss = keras.ops.mean(keras.ops.square(model(x, training=True) - y))
    loss.backward()
    gradients = [v.value.grad for v in model.trainable_variables]
    with torch.no_grad():
        for optimizer, part in zip(optimizers, halves(len(gradients)), strict=True):
            optimizer.apply(gradients[part], model.trainable_variables[part])


def step_of_jax(model, optimizers, x, y):
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        *(optimizer.variables for optimizer in optimizers),
    )
    values = _updated(model, optimizers)([[v.value for v in part] for part in variables], x, y)
    for part, new in zip(variables, values, strict=True):
        for variable, value in zip(part, new, strict=True):
            variable.assign(value)


@functools.cache
def _updated(model, optimizers):
    import jax

    def loss(trained, others, x, y):
        outputs, others = model.stateless_call(trained, others, x, training=True)
        return keras.ops.mean(keras.ops.square(outputs - y)), others

    def updated(values, x, y):
        trained, others, *states = values
        gradients, others = jax.grad(loss, has_aux=True)(trained, others, x, y)
        parts = halves(len(gradients))
        for number, (optimizer, part) in enumerate(zip(optimizers, parts, strict=True)):
            trained[part], states[number] = optimizer.stateless_apply(
                states[number], gradients[part], trained[part]
            )
        return [trained, others, *states]

    return jax.jit(updated)


STEPS = {"tensorflow": step_of_tensorflow, "torch": step_of_torch, "jax": step_of_jax}


def halves(number):
    return [slice(number // 2), slice(number // 2, number)]


def test_a_loop_of_the_backends_own_with_several_optimizers():
    model = noisy_with_batch_norm()
    optimizers = (keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.01))
    parts = halves(len(model.trainable_variables))
    for optimizer, part in zip(optimizers, parts, strict=True):
        optimizer.build(model.trainable_variables[part])
    swa, seen = SWA({"start": "50%", "every": "2step"}, bn_data=X), []
    swa.begin(model, total_steps=12)
    for step in range(12):
        begin = 6 * (step % 4)
        tensors = map(keras.ops.convert_to_tensor, (X[begin : begin + 6], Y[begin : begin + 6]))
        STEPS[BACKEND](model, optimizers, *tensors)
        swa.update(model)
        if step + 1 in (6, 8, 10, 12):
            seen.append(values_of(model))
    assert (swa.n_averaged, swa.updates) == (4, 12)
    mean = [np.mean(values, axis=0, dtype="float64") for values in zip(*seen, strict=True)]
    for average, expected in zip(swa.averaged_weights, mean, strict=True):
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-8)
    live = [array(v) for v in model.variables]
    with swa.averaged():
        same(values_of(model), swa.averaged_weights)
    same([array(v) for v in model.variables], live)
    swa.finalize()
    kernel, bias = map(array, (model.layers[0].kernel, model.layers[0].bias))
    exact = X.astype("float64") @ kernel + bias
    np.testing.assert_allclose(array(model.layers[1].moving_mean), exact.mean(0), atol=1e-6)


def noisy_with_batch_norm():
    keras.utils.set_random_seed(7)
    return sequential(
        LAYERS.Dense(5), LAYERS.BatchNormalization(), LAYERS.Dropout(0.2), LAYERS.Dense(1)
    )


class TwoOptimizers(keras.Model):
    """A train_step with an optimizer for the first layer and another for the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = LAYERS.Dense(4, "tanh"), LAYERS.Dense(1)
        self.optimizers = [keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.01)]

    def build(self, shape):
        self.first.build(shape)
        self.second.build((None, 4))

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        step = step_of_tensorflow if BACKEND == "tensorflow" else step_of_torch
        step(self, self.optimizers, *data)
        return {"loss": 0.0}


@pytest.mark.skipif(BACKEND == "jax", reason="a step on jax has the state of one optimizer alone")
def test_several_optimizers_in_a_train_step():
    keras.utils.set_random_seed(7)
    model = TwoOptimizers()
    model.build((None, 4))
    for optimizer, part in zip(model.optimizers, halves(4), strict=True):
        optimizer.build(model.trainable_variables[part])
    model.compile()
    swa, seen = SWA({"start": "2step", "every": "3step"}), Snapshots()
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: swa.update(model))
    fit(model, count, seen)
    seen.taken = seen.taken[1::3]
    assert swa.n_averaged == len(seen.taken) == 5
    for average, expected in zip(swa.averaged_weights, seen.mean(), strict=True):
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-8)


def test_update_called_from_another_callback_is_the_same_as_the_callback():
    build = MODELS["nested"][0]
    by_callback, by_hand = SWA(EVERY_STEP, finalize=False), SWA(EVERY_STEP)
    fit(made(build), by_callback)
    model = made(build)
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: by_hand.update(model)
    )
    fit(model, count)
    same(by_hand.averaged_weights, by_callback.averaged_weights)


def test_a_model_without_lora_or_batch_norm_has_no_caveats():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(made(MODELS["nested"][0]), SWA(EVERY_STEP), epochs=1)
