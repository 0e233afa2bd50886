"""Trainings in Keras: ``fit`` of a model whose gradients are its data, which an optimizer assigns.

The data of a batch are the weights that it leads to: the loss is their product with the weights,
and so its gradient.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from correctness.cells import NotApplicableError
from correctness.peer import (
    Outcome,
    Peer,
    RaisedWhileSwappedError,
    Statistics,
    Swap,
    Tree,
)
from correctness.rules import Rule
from correctness.scripts import Array, Intent, Script, batches

PACKAGE = "swa-core-correctness"
EPOCHS = 10  # of a training that is interrupted


@keras.saving.register_keras_serializable(PACKAGE)
class Follow(keras.optimizers.Optimizer):
    """Assigns gradients: the step leads to the weights that are handed over as such."""

    def __init__(self, learning_rate: float = 1.0, name: str = "follow", **keywords: Any) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **keywords)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign(variable, gradient)


class Weights(keras.layers.Layer):
    """``x @ kernel + bias`` for the batch norm, and the product with the data for the loss."""

    def __init__(self, script: Script, first: Weights | None = None) -> None:
        super().__init__(dtype=script.dtype)
        self.script, self.first = script, first
        self.count = None

    def build(self, shape: Any) -> None:
        def constant(value: Array) -> Any:
            return lambda shape, dtype: ops.cast(ops.convert_to_tensor(np.float32(value)), dtype)

        kernel, bias = self.script.kernel[0], self.script.bias[0]
        if self.first is not None:
            self.kernel = self.first.kernel  # tied
        else:
            self.kernel = self.add_weight(shape=kernel.shape, initializer=constant(kernel))
        self.bias = self.add_weight(shape=bias.shape, initializer=constant(bias))
        if self.script.counts is not None:
            self.count = self.add_weight(
                shape=(), dtype="int32", initializer="zeros", trainable=False
            )
        self.built = True

    def call(self, data: Any, training: bool = False) -> Any:
        targets, x = data
        if training and self.count is not None:
            self.count.assign(self.count + self.script.counts[1])
        targets = ops.cast(targets, self.compute_dtype)
        weights = ops.concatenate([ops.reshape(self.kernel, (-1,)), self.bias])
        product = ops.sum(targets * weights, axis=-1, keepdims=True)
        return product, ops.matmul(ops.cast(x, self.compute_dtype), self.kernel) + self.bias


def model_of(script: Script, optimizer: Any) -> tuple[Any, Weights]:
    """A compiled model in the script's initial weights, and the layer that has them."""
    size = script.kernel[0].size + script.bias[0].size
    inputs = (keras.Input((size,)), keras.Input((script.kernel.shape[1],)))
    layer = Weights(script)
    product, y = layer(inputs)
    if script.tied:
        second = Weights(script, layer)
        product = product + 0.0 * second(inputs)[0]
    if script.batch_norm:
        norm = keras.layers.BatchNormalization(center=False, scale=False, name="norm", momentum=0.9)
        product = product + 0.0 * ops.sum(norm(y), axis=-1, keepdims=True)
    model = keras.Model(inputs, product)
    model.compile(optimizer, loss=lambda true, predicted: ops.mean(predicted))
    return model, layer


def data_of(script: Script, begin: int = 0) -> Iterator[tuple[Any, Array]]:
    """Batches, the first of which leads to the weights of update ``begin + 1``."""
    inputs = batches(script) if script.batch_norm else [np.zeros((1, script.kernel.shape[1]))]
    for update in range(begin + 1, script.updates + 1):
        x = inputs[update % len(inputs)].astype(np.float32)
        target = np.append(script.kernel[update].ravel(), script.bias[update]).astype(np.float32)
        yield (np.repeat(target[None], len(x), 0), x), np.zeros((len(x), 1), np.float32)


def host(layer: Weights) -> dict[str, Array]:
    """Float64 copies of kernel and bias."""
    return {
        name: np.array(keras.ops.convert_to_numpy(getattr(layer, name)), np.float64)
        for name in ("kernel", "bias")
    }


def address(variable: Any) -> int:
    """Where a variable lies."""
    if keras.backend.backend() == "jax":
        return variable.value.unsafe_buffer_pointer()
    if keras.backend.backend() == "torch":
        return variable.value.data_ptr()
    raise NotApplicableError("tensorflow does not show it")


class Recorder(keras.callbacks.Callback):
    """Reads the weights during an evaluation and after it, and raises inside if asked to.

    Args:
      layer: whose weights are read.
      raising: whether.
    """

    def __init__(self, layer: Weights, *, raising: bool) -> None:
        super().__init__()
        self.layer, self.raising = layer, raising
        self.seen: dict[str, Tree] = {}

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if "during" not in self.seen:
            _ = self.model  # brings variables up to date on jax
            self.seen["during"] = host(self.layer)
            if self.raising:
                raise RaisedWhileSwappedError

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        _ = self.model
        self.seen["after"] = host(self.layer)


class Interrupted(keras.callbacks.Callback):
    """Ends a training like a signal does, before an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            raise RaisedWhileSwappedError


class KerasPeer(Peer):
    """``fit`` with what a subclass puts into it; it ends with the average in the model."""

    def __init__(self, name: str, rule: Rule) -> None:
        self.name, self.rule = f"{name} ({keras.backend.backend()})", rule

    # What subclasses have to say.

    def make(self, intent: Intent | None) -> tuple[Any, list[Any]]:
        """The optimizer and the callbacks of a training."""
        raise NotImplementedError

    def average(self, model: Any, layer: Weights, callbacks: Sequence[Any]) -> tuple[Tree, str]:
        """The average in its own precision, and its dtype."""
        raise NotImplementedError

    def backup(self, folder: str, callbacks: Sequence[Any]) -> Any:
        """The callback that saves at epochs and goes on."""
        raise NotImplementedError

    def recompute(self, model: Any, inputs: list[Any]) -> str:
        """Recomputes batch norm and says by what; "" for who does not."""
        return ""

    # The rest follows.

    def train(self, script: Script, intent: Intent | None = None) -> Outcome:
        optimizer, callbacks = self.make(intent)
        model, layer = model_of(script, optimizer)
        model.fit(data_of(script), verbose=0, callbacks=callbacks, **self._length(script, 1))
        average, dtype = self.average(model, layer, callbacks)
        outcome = Outcome(average, dtype, script.at(script.updates))
        if script.counts is not None:
            outcome.count = float(keras.ops.convert_to_numpy(layer.count))
        if script.tied:
            (second,) = [it for it in model.layers if getattr(it, "first", None) is layer]
            outcome.average = {**average, "tied": host(second)["kernel"]}
            outcome.tied = second.kernel is layer.kernel
        return outcome

    def resumed(self, script: Script, cut: int) -> Outcome:
        epochs_done = EPOCHS * cut // script.updates
        with tempfile.TemporaryDirectory() as folder:
            for begin in (0, cut):
                optimizer, callbacks = self.make(None)
                model, layer = model_of(script, optimizer)
                backup = self.backup(f"{folder}/backup", callbacks)
                also = [] if begin else [Interrupted(epochs_done)]
                try:
                    model.fit(
                        data_of(script, begin),
                        verbose=0,
                        callbacks=[*also, *callbacks, backup],
                        **self._length(script, EPOCHS),
                    )
                except RaisedWhileSwappedError:
                    continue
            average, dtype = self.average(model, layer, callbacks)
        return Outcome(average, dtype, script.at(script.updates))

    def swapped(self, script: Script, *, raising: bool) -> Swap:
        optimizer, callbacks = self.make(None)
        model, layer = model_of(script, optimizer)
        recorder = Recorder(layer, raising=raising)
        inputs, y = next(data_of(script))
        try:
            model.fit(
                data_of(script),
                verbose=0,
                callbacks=[*callbacks, recorder],
                validation_data=(inputs, y),
                **self._length(script, 1),
            )
        except RaisedWhileSwappedError:
            recorder.seen["after"] = host(layer)
        return Swap(script.at(script.updates), recorder.seen["during"], recorder.seen["after"])

    def batch_norm(self, script: Script, inputs: list[Array]) -> Statistics:
        optimizer, callbacks = self.make(None)
        model, layer = model_of(script, optimizer)
        model.fit(data_of(script), verbose=0, callbacks=callbacks, **self._length(script, 1))

        def statistics() -> dict[str, Array]:
            norm = model.get_layer("norm")
            read = {"mean": norm.moving_mean, "var": norm.moving_variance}
            return {
                name: np.array(ops.convert_to_numpy(value), np.float64)
                for name, value in read.items()
            }

        training = statistics()
        size = script.kernel[0].size + script.bias[0].size
        how = self.recompute(model, [((np.zeros((len(x), size), np.float32), x),) for x in inputs])
        return Statistics(host(layer), statistics(), training, biased=True, how=how)

    def copied(self, script: Script, cut: int, way: str) -> Outcome:
        raise NotApplicableError("runs inside fit")

    def kept(self, model: Any) -> list[Any]:
        """The variables that hold the average."""
        raise NotApplicableError("copies come out")

    def memory(self, script: Script) -> dict[str, bool]:
        optimizer, callbacks = self.make(None)
        model, layer = model_of(script, optimizer)
        model.fit(data_of(script), verbose=0, callbacks=callbacks, **self._length(script, 1))
        kept = self.kept(model)
        live = {address(layer.kernel), address(layer.bias)}
        return {"after fit": any(address(each) in live for each in kept)}

    @staticmethod
    def _length(script: Script, epochs: int) -> dict[str, int]:
        return {"epochs": epochs, "steps_per_epoch": script.updates // epochs}
