"""The experiments in Keras, on any backend; on tensorflow if ``KERAS_BACKEND`` does not say."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, ClassVar

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np

from experiments import keras_networks, networks
from experiments.arms import Arm
from experiments.images import Batch, Images
from experiments.keras_sgd import SGD
from swa_keras import SWA, update_bn


class Training:
    """See ``experiments.training.Training``.

    All trainings of one experiment share a model, so that it is compiled once: the one that was
    made last has it, and those before can be used no more.
    """

    _owners: ClassVar[dict[int, Training]] = {}

    def __init__(self, images: Images, seed: int):
        keras.utils.set_random_seed(seed)
        self._images, self._seed = images, seed
        experiment = images.experiment
        self._model, self._weights = _compiled(
            experiment.network,
            images.train_x.shape[1:],
            images.classes,
            experiment.momentum,
            experiment.weight_decay,
        )
        self._owners[id(self._model)] = self
        initial = networks.weights(experiment.network, images.channels, images.classes, seed)
        _assign(self._weights, initial)
        for layer in self._model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
                layer.moving_variance.assign(np.ones(layer.moving_variance.shape))
        for variable in self._model.optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        self._averages: dict[str, SWA] = {}
        self._snapshots: dict[str, list[int]] = {}

    @property
    def model(self) -> keras.Model:
        """The model, with the weights of this training."""
        if self._owners[id(self._model)] is not self:
            raise RuntimeError("another Training has been made, which has the model now")
        return self._model

    def begin(self, arm: Arm) -> None:
        self._arm = arm
        self._averages = {
            # Validation and the end of ``fit`` leave the running weights in the model.
            name: SWA(config, name=name, validate="raw", finalize=False, bn_data=self._for_bn)
            for name, config in arm.averages
        }
        for swa in self._averages.values():
            swa.set_model(self.model)
        self._snapshots = {name: [] for name in self._averages}

    def epoch(self, batches: Iterable[Batch], epoch: int) -> None:
        model = self.model
        cyclical = any(config.lr for _, config in self._arm.averages)
        if epoch == self._arm.begin or not cyclical:  # from the first snapshot on it is [swa.lr]'s
            model.optimizer.learning_rate = self._arm.rate(epoch)
        watch = _Watch(self._averages, self._snapshots)
        callbacks = [*self._averages.values(), watch]
        model.fit(_Batches(batches), shuffle=False, verbose=0, callbacks=callbacks)

    def snapshots(self, average: str) -> list[int]:
        return self._snapshots[average]

    def logits(self, average: str | None, *, bn: bool, images: int | None = None) -> np.ndarray:
        model, x = self.model, self._images.test_x[:images]
        statistics = _values(model.non_trainable_variables)
        with self._averages[average].averaged() if average else nullcontext():
            if average and not bn:
                _assign(model.non_trainable_variables, statistics)
            elif bn and not average:
                update_bn(model, self._for_bn, verbose=0)
            found = model.predict(x, batch_size=500, verbose=0)
        _assign(model.non_trainable_variables, statistics)
        return found

    def average(self, average: str) -> list[np.ndarray]:
        places = {id(v): place for place, v in enumerate(self.model.trainable_variables)}
        averaged = self._averages[average].averaged_weights
        return [averaged[places[id(variable)]] for variable in self._weights]

    def state(self, *, averages: bool) -> dict[str, Any]:
        model = self.model
        state = {"model": _values(model.variables), "sgd": _values(model.optimizer.variables)}
        if averages:
            state["averages"] = {name: swa.state_dict() for name, swa in self._averages.items()}
            state["snapshots"] = self._snapshots
        return state

    def restore(self, state: dict[str, Any]) -> None:
        model = self.model
        _assign(model.variables, state["model"])
        _assign(model.optimizer.variables, state["sgd"])
        for name, saved in state.get("averages", {}).items():
            self._averages[name].load_state_dict(saved)
        self._snapshots |= state.get("snapshots", {})

    def _for_bn(self) -> list[np.ndarray]:
        return self._images.for_bn(self._seed)


class _Batches(keras.utils.PyDataset):
    """An epoch's batches."""

    def __init__(self, batches: Iterable[Batch]):
        super().__init__()
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: int) -> Batch:
        return self._batches[place]


class _Watch(keras.callbacks.Callback):
    """Notes the updates that joined the averages, which are listed before it."""

    def __init__(self, averages: dict[str, SWA], snapshots: dict[str, list[int]]):
        super().__init__()
        self._averages, self._snapshots = averages, snapshots

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for name, swa in self._averages.items():
            if swa.n_averaged > len(self._snapshots[name]):
                self._snapshots[name].append(swa.updates)


@cache
def _compiled(
    name: str, shape: tuple[int, int, int], classes: int, momentum: float, weight_decay: float
) -> tuple[keras.Model, list[keras.Variable]]:
    model, weights = keras_networks.build(name, shape, classes)
    model.compile(
        optimizer=SGD(0.1, momentum=momentum, weight_decay=weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # XLA's convolutions are slower on a CPU than those of tensorflow.
        jit_compile=keras.backend.backend() == "jax",
    )
    model.optimizer.build(model.trainable_variables)
    return model, weights


def _values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in variables]


def _assign(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
