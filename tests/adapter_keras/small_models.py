"""Small models, data and recorders for the tests of the Keras adapter."""

from __future__ import annotations

import keras
import numpy as np

import swa_core
from swa_keras.backend import current

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True) + RNG.normal(size=(24, 1)).astype("float32")
STEPS = 4  # batches of 6


def dense(optimizer=None, **compile_with):
    """A small regression, the same at every call."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)]
    )
    return compiled(model, optimizer, **compile_with)


def with_batch_norm(optimizer=None, **compile_with):
    """The same with batch norm and dropout (which keeps a seed)."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    return compiled(model, optimizer, **compile_with)


def compiled(model, optimizer=None, **compile_with):
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", metrics=["mae"], **compile_with)
    return model


def fit(model, *callbacks, **arguments):
    keras.utils.set_random_seed(8)
    arguments = {"epochs": 4, "batch_size": 6, "verbose": 0, **arguments}
    data = arguments.pop("data", None)
    if data is not None:
        arguments |= {"batch_size": None, "shuffle": False}
    data = (X, Y) if data is None else (data,)
    return model.fit(*data, callbacks=list(callbacks), **arguments)


def array(variable):
    return current().to_numpy(keras.ops.convert_to_tensor(variable))


def weights(model):
    return [array(v) for v in model.trainable_variables]


def everything(model):
    """Every variable of the model and its optimizer, metrics excepted."""
    optimizer = [] if model.optimizer is None else model.optimizer.variables
    found = [*model.trainable_variables, *model.non_trainable_variables, *optimizer]
    return [array(v) for v in found]


def same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def close(actual, expected, rtol=1e-6):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def core_average(recorded, schedule, rule, nonfinite="skip"):
    """What the core makes of the weights after every update."""
    state = swa_core.init(recorded[min(recorded)])
    for update in sorted(recorded):
        state = swa_core.update(state, recorded[update], schedule, rule, nonfinite=nonfinite)
    return state


def averages(swa, updates, schedule=None):
    """Checks a callback's average against the core's on the weights after every update."""
    core = core_average(updates, schedule or swa.schedule, swa.config.rule)
    assert swa.n_averaged == core.n_averaged
    close(swa.averaged_weights, core.average)


class Recorder(keras.callbacks.Callback):
    """The weights after every update, by the number of the batch in the training."""

    def __init__(self):
        super().__init__()
        self.after = {}

    def on_train_batch_end(self, batch, logs=None):
        self.after[len(self.after) + 1] = weights(self.model)


class Updates(keras.callbacks.Callback):
    """The weights after every update that changed them, by its number in the training; it may be
    listed in several calls of ``fit``."""

    def __init__(self):
        super().__init__()
        self.after = {}
        self._latest = None

    def on_train_batch_begin(self, batch, logs=None):
        # What was loaded between two epochs is no update.
        if batch == 0 and self.model.built:
            self._latest = weights(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.look(self.model)

    def look(self, model):
        now, before = weights(model), self._latest
        if before is None or any((a != b).any() for a, b in zip(now, before, strict=True)):
            self.after[len(self.after) + 1] = self._latest = now


def stream(steps=STEPS):
    """A dataset whose length Keras does not know until it has run out."""
    if keras.backend.backend() == "torch":
        import torch

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                for number in range(steps):
                    begin = 6 * (number % STEPS)
                    yield X[begin : begin + 6], Y[begin : begin + 6]

        return torch.utils.data.DataLoader(Stream(), batch_size=None)
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(6).repeat().take(steps)
    return dataset.filter(lambda x, y: True)  # the cardinality is unknown now
