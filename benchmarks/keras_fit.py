"""Trainings with and without averaging: everybody fits the same network on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras_contenders import EMA, NAIVE, settle, wait_for
from keras_sets import host, network
from timing import Table

import swa_keras
from swa_keras import SWA

STEPS, BATCH = 10, 32
PLAIN = "plain training"
ONCE = "swa_keras, not due any more"
EVERY_EPOCH = "swa_keras, every epoch"
EVERY_TENTH = "swa_keras, every 10th update"
EVERY_UPDATE = "swa_keras, every update"
IN_GRAPH = "swa_keras.SWAOptimizer, every update"
KEEP = f'{EVERY_UPDATE}, nonfinite="keep"'
SCHEDULES = {
    ONCE: {"start": "1step", "every": "1000000000step"},
    EVERY_EPOCH: {"start": f"{STEPS}step", "every": f"{STEPS}step"},
    EVERY_TENTH: {"start": "10step", "every": "10step"},
    EVERY_UPDATE: {"start": "1step", "every": "1step"},
    KEEP: {"start": "1step", "every": "1step", "nonfinite": "keep"},
}


class Stopwatch(keras.callbacks.Callback):
    """Seconds of the epochs of a ``fit``, until what they started is computed."""

    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__()
        self._wait = wait
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        wait_for(self.model)
        wait_for(self.model.optimizer)
        self._wait()
        self.seconds = time.perf_counter() - self._begin


class NumpyMean(keras.callbacks.Callback):
    """The callback of ten lines that everybody writes, at every update."""

    def __init__(self) -> None:
        super().__init__()
        self.averages: list[Any] = []
        self.count = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count += 1
        weights = self.model.get_weights()
        if not self.averages:
            self.averages = [np.array(w) for w in weights]
        for average, weight in zip(self.averages, weights, strict=True):
            average += (np.asarray(weight) - average) / self.count


class Float64Mean(NumpyMean):
    """The same in float64, to compare with."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.averages:
            self.averages = [np.float64(w) * 0 for w in self.model.get_weights()]
        super().on_train_batch_end(batch, logs)


class Training:
    """One contender's model, which goes on being trained."""

    def __init__(
        self,
        *,
        tiny: bool,
        use_ema: bool = False,
        callback: Any = None,
        wrapped: Callable[[keras.Optimizer], keras.Optimizer] = lambda optimizer: optimizer,
    ) -> None:
        optimizer = keras.optimizers.Adam(1e-4, use_ema=use_ema, ema_momentum=0.9)
        self.model = network(tiny=tiny, optimizer=wrapped(optimizer))
        self.use_ema = use_ema
        self.callbacks = [] if callback is None else [callback]
        self.seconds = 0.0
        width = self.model.input_shape[-1]
        rng = np.random.default_rng(0)
        self._x = rng.standard_normal((STEPS * BATCH, width), np.float32)
        self._y = np.tanh(self._x[:, ::-1])

    @property
    def validation_data(self) -> tuple[Any, Any]:
        """Some of the data."""
        return self._x[:BATCH], self._y[:BATCH]

    def epoch(self, **arguments: Any) -> None:
        """One ``fit`` of one epoch, of which the batches are timed."""
        swas = [callback for callback in self.callbacks if isinstance(callback, SWA)]
        watch = Stopwatch(lambda: [settle(swa) for swa in swas])
        self.model.fit(
            self._x,
            self._y,
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[*self.callbacks, watch],
            **arguments,
        )
        self.seconds = watch.seconds
        if self.use_ema and keras.backend.backend() == "jax":
            # fit leaves model and average with the same arrays, which the next fit cannot donate.
            for variable in self.model.optimizer._model_variables_moving_average:
                variable.assign(np.array(variable.value))


# The optimizer that averages within the compiled step.
in_graph: Any = getattr(swa_keras, "SWAOptimizer", None)


def swa(name: str) -> SWA:
    """Our callback by its row, with nothing but the averaging."""
    return SWA(SCHEDULES[name], validate="raw", finalize=False)


def trainings(*, tiny: bool) -> dict[str, Training]:
    """Everybody, by their rows."""
    out = {PLAIN: Training(tiny=tiny)}
    out |= {name: Training(tiny=tiny, callback=swa(name)) for name in SCHEDULES}
    if in_graph is not None:
        out[IN_GRAPH] = Training(tiny=tiny, wrapped=lambda o: in_graph(o, SCHEDULES[EVERY_UPDATE]))
    out[NAIVE] = Training(tiny=tiny, callback=NumpyMean())
    out[EMA] = Training(tiny=tiny, use_ema=True, callback=keras.callbacks.SwapEMAWeights())
    return out


def fitting(rounds: int, *, tiny: bool) -> Table:
    """A batch of ``fit``, with and without averaging."""
    running = trainings(tiny=tiny)
    times: dict[str, list[float]] = {name: [] for name in running}
    # The first epoch compiles, and in the second the first snapshots are old.
    for number in range(-2, rounds):
        for name, training in running.items():
            training.epoch()
            if number >= 0:
                times[name].append(training.seconds)
    plain = [host(v) for v in running[PLAIN].model.variables]
    for name, training in running.items():
        if not training.use_ema:
            found = [host(v) for v in training.model.variables]
            assert all(map(np.array_equal, found, plain)), f"{name} changed the training"
    errors = _errors(running, tiny=tiny)
    weights = sum(np.size(w) for w in plain) / 1e6
    title = f"A batch of fit: Adam, {weights:.1f} M float32 weights"
    about = {"kind": "training", "of": f"Adam, {weights:.1f} M"}
    out = Table(title, times, PLAIN, STEPS, about=about)
    base = out.medians()[PLAIN]
    out.column("fastest", out.fastest(), "{:.2f}")
    out.column("ms more", {n: 1e3 * (s - base) for n, s in out.medians().items()}, "{:.2f}")
    out.column("error", errors, "{:.0e}")
    return out


def _errors(running: dict[str, Training], *, tiny: bool) -> dict[str, float]:
    """Relative errors of averages of every update of an epoch that is not timed."""
    errors = {}
    for name in (EVERY_UPDATE, KEEP, NAIVE):
        training = running[name]
        average = NumpyMean() if name == NAIVE else swa(name)
        right = Float64Mean()
        training.callbacks = [average, right]
        training.epoch()
        found = average.averages if name == NAIVE else average.averaged_weights
        errors[name] = _error(found, right.averages)
    if IN_GRAPH in running:
        right = Float64Mean()
        training = Training(tiny=tiny, wrapped=lambda o: in_graph(o, SCHEDULES[EVERY_UPDATE]))
        training.callbacks = [right]
        training.epoch()
        errors[IN_GRAPH] = _error(training.model.optimizer.averaged_weights, right.averages)
    for name, error in errors.items():
        assert error < 1e-6, f"{name}: the average is off by {error:.1e}"
    return errors


def _error(found: list[Any], right: list[Any]) -> float:
    return max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, right, strict=True)
    )
