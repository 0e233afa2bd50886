"""A small training, and the averages it should lead to, the same on any number of devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from adapter_keras.small_models import Recorder, array, close, everything, same, weights

import swa_core
from swa_keras import SWA

RNG = np.random.default_rng(1)
X = RNG.normal(0.5, 1, size=(32, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True) + RNG.normal(size=(32, 1)).astype("float32")
BATCH, EPOCHS = 8, 3  # 4 updates an epoch; every batch can be cut for 8 devices
CONFIG = {"start": "5step", "every": "3step"}  # snapshots 5, 8, 11


def network(*, dropout: float = 0.0, synchronized: bool = False, policy: Any = None) -> Any:
    """Two layers that a layout map can shard, batch norm and dropout; the same at every call."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, "tanh", name="wide", dtype=policy),
            layers.BatchNormalization(momentum=0.9, synchronized=synchronized, name="norm"),
            layers.Dropout(dropout, seed=3),
            layers.Dense(8, name="narrow", dtype=policy),
            layers.Dense(1, name="last"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.02, momentum=0.5), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


class Data(NamedTuple):
    """What a process trains on, and by how many rows at a time."""

    x: Any = X
    y: Any = Y
    batch: int = BATCH


WHOLE = Data()


def train(model: Any, *callbacks: Any, data: Data = WHOLE, **arguments: Any) -> Any:
    keras.utils.set_random_seed(8)
    arguments = {
        "validation_data": (data.x, data.y),
        "epochs": EPOCHS,
        "shuffle": False,
        "batch_size": data.batch,
        "verbose": 0,
        **arguments,
    }
    return model.fit(data.x, data.y, callbacks=[*callbacks], **arguments)


class Saver(keras.callbacks.Callback):
    """What a checkpoint after the second epoch would hold, in numpy arrays."""

    def __init__(self, swa: SWA) -> None:
        super().__init__()
        self._swa = swa

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.values, self.state = everything(self.model), self._swa.state_dict()


class Trained(NamedTuple):
    model: Any
    swa: SWA
    recorded: dict[int, list[np.ndarray]]
    saved: Saver
    history: dict[str, list[float]]


def averaging(data: Data = WHOLE) -> SWA:
    return SWA(CONFIG, bn_data=bn_data(data), finalize=False)


def of_every_update() -> SWA:
    """For a loop without ``fit`` that does not use the average."""
    return SWA({"start": "1step", "every": "1step"}, bn_data=(X, Y))


def bn_data(data: Data) -> Any:
    """Batches as large as those of the training."""
    return [(data.x[i : i + data.batch],) for i in range(0, len(data.x), data.batch)]


def trained(model: Any, data: Data = WHOLE) -> Trained:
    """The model after a training with averaging, which is not finalized."""
    recorder, swa = Recorder(), averaging(data)
    saver = Saver(swa)
    history = train(model, recorder, swa, saver, data=data)
    return Trained(model, swa, recorder.after, saver, history.history)


def averages_are_the_cores(run: Trained) -> None:
    """On the weights recorded after every update."""
    state = swa_core.init(run.recorded[1])
    for recorded in run.recorded.values():
        state = swa_core.update(state, recorded, run.swa.schedule, swa_core.Uniform())
    assert run.swa.n_averaged == state.n_averaged == 3
    close(run.swa.averaged_weights, state.average, rtol=2e-6)


def same_as_on_one_device(run: Trained, one: Trained) -> None:
    """Averages and what validation inside ``fit`` found, but for the rounding of the training."""
    for actual, expected in zip(run.swa.averaged_weights, one.swa.averaged_weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert run.history.keys() == one.history.keys()
    for name, values in one.history.items():
        np.testing.assert_allclose(run.history[name], values, rtol=1e-4, err_msg=name)
    assert run.history["val_swa_loss"][-1] != run.history["val_loss"][-1]


def swapping_gives_back_every_bit(run: Trained, data: Data = WHOLE) -> None:
    """Inside the block the model computes with the average, after it everything is as before."""
    before = everything(run.model)
    with run.swa.averaged():
        same(weights(run.model), run.swa.averaged_weights)
        changed = everything(run.model)
        loss, _ = run.model.evaluate(data.x, data.y, batch_size=data.batch, verbose=0)
    np.testing.assert_allclose(loss, run.history["val_swa_loss"][-1], rtol=1e-6)
    assert any(not np.array_equal(a, b) for a, b in zip(changed, before, strict=True))
    same(everything(run.model), before)


def variables_of(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def resuming_is_bit_identical(run: Trained, second: Any, data: Data = WHOLE) -> SWA:
    """The training goes on with a new model from what was saved after two epochs."""
    swa = averaging(data)
    own = [*second.trainable_variables, *second.non_trainable_variables]
    for variable, value in zip([*own, *second.optimizer.variables], run.saved.values, strict=True):
        variable.assign(value)
    swa.load_state_dict(run.saved.state)
    assert swa.n_averaged == 2
    train(second, swa, data=data, initial_epoch=2)
    assert swa.n_averaged == run.swa.n_averaged == 3
    same(swa.averaged_weights, run.swa.averaged_weights)
    same(everything(second), everything(run.model))
    return swa


def numpys_statistics(model: Any, x: Any) -> tuple[Any, Any]:
    """Mean and variance of what reaches the batch norm, in float64."""
    kernel, bias = map(array, model.trainable_variables[:2])
    hidden = np.tanh(x.astype("float64") @ kernel + bias)
    return hidden.mean(0), hidden.var(0)


def statistics_are_those_of(model: Any, x: Any) -> None:
    norm, (mean, variance) = model.get_layer("norm"), numpys_statistics(model, x)
    np.testing.assert_allclose(array(norm.moving_mean), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(norm.moving_variance), variance, rtol=1e-5)
