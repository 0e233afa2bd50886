"""The demo's network in Keras, on any backend. What averaging adds is marked."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from data import Batch, Data
from record import LINE, Record, score

from swa_core import SWAConfig
from swa_keras import SWA, update_bn


def network(data: Data) -> keras.Model:
    # The other two frameworks' defaults where Keras' own differ, so that the networks are alike.
    convolution = {"padding": "same", "use_bias": False, "kernel_initializer": "lecun_normal"}
    layers = [keras.Input(data.train_x.shape[1:])]
    for features, stride in ((16, 1), (32, 2), (32, 2)):
        layers += [
            keras.layers.Conv2D(features, 3, strides=stride, **convolution),
            keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            keras.layers.ReLU(),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(data.classes, kernel_initializer="lecun_normal"),
    ]
    return keras.Sequential(layers)


class Batches(keras.utils.PyDataset):
    """The training batches, shuffled anew for each epoch."""

    def __init__(self, data: Data, size: int, seed: int) -> None:
        super().__init__()
        self.data, self.size, self.rng = data, size, np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        self.epoch = list(self.data.batches(self.size, self.rng))

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitem__(self, place: int) -> Batch:
        return self.epoch[place]


def compiled(data: Data, rate) -> keras.Model:
    model = network(data)
    model.compile(
        optimizer=keras.optimizers.SGD(rate, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


class Watch(keras.callbacks.Callback):
    """Notes what the demo shows: the snapshots, and the test loss after each epoch."""

    def __init__(self, swa: SWA | None, record: Record, curves: bool, progress: Callable[[], None]):
        super().__init__()
        self.swa, self.record, self.curves, self.progress = swa, record, curves, progress

    def on_train_batch_end(self, batch, logs=None):
        if self.swa is not None and self.swa.n_averaged > len(self.record.snapshots):
            self.record.snapshots.append(self.swa.updates)

    def on_epoch_end(self, epoch, logs=None):
        if self.curves:
            # val_* is the loss of the running weights, val_swa_* that of the average.
            self.record.last.append(logs["val_loss"])
            self.record.average.append(logs["val_swa_loss"] if self.swa.n_averaged else None)
        self.progress()


def train(
    data: Data,
    config: SWAConfig,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    curves: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Trains with averaging."""
    keras.utils.set_random_seed(seed)
    model = compiled(data, rate)
    record = Record()
    swa = SWA(config, bn_data=data.for_bn, finalize=False)  # averaging: add a callback to fit
    model.fit(
        Batches(data, batch_size, seed),
        shuffle=False,  # Batches does it itself
        validation_data=(data.test_x, data.test_y) if curves else None,
        validation_batch_size=1000,
        epochs=epochs,
        callbacks=[swa, Watch(swa, record, curves, progress)],
        verbose=0,
    )
    record.scores["last"] = score(logits(model, data.test_x), data.test_y)
    statistics = values_of(model.non_trainable_variables)
    with swa.averaged():  # recomputes the batch-norm statistics; this score is the one without
        assign(model.non_trainable_variables, statistics)
        record.scores["average"] = score(logits(model, data.test_x), data.test_y)
    if curves:
        record.line = loss_along_line(model, swa, data)
    swa.finalize(bn_data=data.for_bn)  # averaging: keep it (fit does so itself with finalize=True)
    record.scores["average + update_bn"] = score(logits(model, data.test_x), data.test_y)
    return record


def train_annealed(
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """The baseline without averaging: the rate annealed to zero along a cosine."""
    keras.utils.set_random_seed(seed)
    steps = epochs * data.steps_per_epoch(batch_size)
    model = compiled(data, keras.optimizers.schedules.CosineDecay(rate, steps))
    watch = Watch(None, Record(), False, progress)
    model.fit(
        Batches(data, batch_size, seed),
        shuffle=False,  # Batches does it itself
        epochs=epochs,
        callbacks=[watch],
        verbose=0,
    )
    return Record(scores={"annealed": score(logits(model, data.test_x), data.test_y)})


def logits(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return model.predict(x, batch_size=1000, verbose=0)


def loss_along_line(model: keras.Model, swa: SWA, data: Data) -> list[float]:
    """The test loss on the line through the last weights (0) and their average (1)."""
    last = values_of(model.trainable_variables)
    statistics = values_of(model.non_trainable_variables)
    losses = []
    for t in LINE:
        for variable, a, b in zip(
            model.trainable_variables, last, swa.averaged_weights, strict=True
        ):
            variable.assign(a + t * (b - a))
        update_bn(model, data.for_bn)
        losses.append(score(logits(model, data.test_x), data.test_y).nll)
    assign(model.trainable_variables, last)
    assign(model.non_trainable_variables, statistics)
    return losses


def values_of(variables: list) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


def assign(variables: list, values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
