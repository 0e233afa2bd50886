"""The clock: from Keras' batches and epochs to completed optimizer updates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from swa_core import ConfigError, LRSchedule, Schedule, SWAConfig, SWAError
from swa_core.errors import Fault
from swa_core.units import Time
from swa_keras.backend import current
from swa_keras.model_state import inner_optimizer, is_loss_scaled

Unit = Literal["update", "epoch"]

_UNKNOWN = (
    "the number of steps per epoch is not known. Give fit steps_per_epoch, or say all times in "
    "steps, or all in whole epochs and percentages."
)


class Timetable(NamedTuple):
    """A configuration resolved for one training.

    Attributes:
      unit: what schedule and rate count. "epoch" only where the steps per epoch are unknown.
      schedule: which updates (or epochs) are snapshots.
      lr: the learning rate in the same unit, or None.
    """

    unit: Unit
    schedule: Schedule
    lr: LRSchedule | None


def timetable(
    config: SWAConfig,
    *,
    steps: int | None,
    epochs: int | None,
    accumulation: int = 1,
    goes_on: bool = False,
) -> Timetable:
    """Resolves a configuration with what Keras knows of the training.

    Args:
      config: what the user wrote.
      steps: batches per epoch; None where the data has no known length.
      epochs: the last epoch of the training.
      accumulation: batches per update. An epoch that is no whole number of updates is rounded
        down, as ``len(loader) // accumulation``.
      goes_on: the training began earlier, so the end of this one is not the end of what was
        counted from the beginning.

    Raises:
      ConfigError: times that cannot be resolved, or no snapshot could come.

    >>> timetable(SWAConfig(), steps=10, epochs=4).schedule
    Schedule(start=30, every=10, stop=None)
    >>> timetable(SWAConfig(), steps=None, epochs=4)
    Timetable(unit='epoch', schedule=Schedule(start=3, every=1, stop=None), lr=None)
    """
    steps = steps or 0
    lengths: dict[str, int | None] = {"steps_per_epoch": None, "total_steps": None}
    unit: Unit = "update"
    if steps >= accumulation:
        lengths["steps_per_epoch"] = steps // accumulation
        if not goes_on or any(time.unit == "%" for time in _times(config).values()):
            lengths["total_steps"] = epochs and epochs * steps // accumulation
    elif any(time.unit != "step" for time in _times(config).values()):
        _check_whole_epochs(config, epochs)
        unit = "epoch"
        lengths = {"steps_per_epoch": 1, "total_steps": epochs}
    return Timetable(unit, config.schedule(**lengths), config.lr_schedule(**lengths))


def _times(config: SWAConfig) -> dict[str, Time]:
    lr = config.lr
    texts = {
        "start": config.start,
        "every": config.every,
        "stop": config.stop,
        "lr.anneal": lr and lr.anneal,
        "lr.cycle": lr and lr.cycle,
    }
    return {key: Time.parse(text) for key, text in texts.items() if text is not None}


def _check_whole_epochs(config: SWAConfig, epochs: int | None) -> None:
    """Refuses what a clock that ticks at the ends of epochs cannot tell."""
    times = _times(config)
    faults = []
    for key, time in times.items():
        # A start or stop as a share is rounded up to whole epochs when `every` counts epochs.
        rounded = key in ("start", "stop") and time.unit == "%" and times["every"].unit == "ep"
        exact = time.value * (epochs or 0) / 100 if time.unit == "%" else time.value
        if time.unit == "step" or key.startswith("lr."):
            faults.append(Fault(f"swa.{key}", f"needs a count of updates, but {_UNKNOWN}"))
        elif exact.denominator != 1 and not rounded:
            faults.append(Fault(f"swa.{key}", f"falls within an epoch, but {_UNKNOWN}"))
    if faults:
        raise ConfigError(faults, source="the schedule")


class UpdateCounter:
    """Counts completed updates during one ``fit``.

    Batches give an upper bound at no cost; only ``read`` asks the optimizer, which knows of
    gradient accumulation and of updates that loss scaling left out, at the price of a
    synchronisation.

    Args:
      model: its optimizer is counted.
      done: updates completed before this ``fit``.
    """

    def __init__(self, model: Any, done: int) -> None:
        optimizer = inner_optimizer(model)
        self._accumulation = accumulation_of(model)
        self._may_skip = is_loss_scaled(model)
        # `iterations` is this one divided by the accumulation, which loses the place within it.
        self._iterations = getattr(optimizer, "_iterations", None)
        if self._iterations is None:
            self._iterations = optimizer.iterations
        self._steps = self._read()
        self._base = done - self._steps // self._accumulation
        self._batches = 0
        self._last_batch = -1

    def new_epoch(self) -> None:
        """Keras numbers the batches of each epoch from 0."""
        self._last_batch = -1

    def data_ran_out(self) -> None:
        """Forgets the step that is counted, and not made, when data of unknown length ends: on
        tensorflow the optimizer's counter moves before the iterator is found empty."""
        surplus = self._read() - self._steps - self._batches
        if surplus > 0 and self._accumulation == 1:
            self._base -= surplus
            self._steps += surplus

    def batch_end(self, batch: int) -> None:
        """Counts the batches up to this one; several have passed with steps_per_execution."""
        self._batches += batch - self._last_batch
        self._last_batch = batch

    @property
    def at_most(self) -> int:
        """No more updates than these are completed; exact but for skipped updates and for the
        shorter last execution of an epoch with steps_per_execution."""
        return self._base + (self._steps + self._batches) // self._accumulation

    @property
    def is_exact(self) -> bool:
        """Whether no update can be skipped, so that batches tell the updates."""
        return not self._may_skip

    def read(self, *, strict: bool = True) -> int:
        """The completed updates. On jax the model must be synced first.

        Raises:
          SWAError: the optimizer made no update at all in the batches counted (``strict`` only).
        """
        steps = self._read()
        if strict and self._batches and steps == self._steps and not self._may_skip:
            raise SWAError(
                f"the optimizer of the model made no update in the last {self._batches} batches, "
                "so updates cannot be counted.",
                hint="if a custom train_step uses another optimizer, leave the callback out of fit "
                "and call swa.update(model) after each update.",
            )
        self._steps, self._batches = steps, 0
        return self._base + self._steps // self._accumulation

    def _read(self) -> int:
        return int(current().to_numpy(keras.ops.convert_to_tensor(self._iterations)))

    def check_executions(
        self, schedule: Schedule, *, steps: int, epochs: int, steps_per_execution: int
    ) -> None:
        """Refuses snapshots that would fall inside an execution of several steps.

        Args:
          schedule: the snapshots in updates.
          steps: batches per epoch.
          epochs: epochs that are still to come; called at the beginning of the first.
          steps_per_execution: batches that run without a word to the callback.

        Raises:
          ConfigError: naming the first such snapshot.
        """
        if steps_per_execution == 1:
            return
        if self._may_skip:
            raise _inside(
                "loss scaling may leave out updates, so that snapshots fall inside an execution "
                f"of {steps_per_execution} steps"
            )
        done = self._base + self._steps // self._accumulation
        end = self._base + (self._steps + epochs * steps) // self._accumulation
        snapshots = np.asarray([u for u in schedule.snapshots(end) if u > done], np.int64)
        batches = (snapshots - self._base) * self._accumulation - self._steps
        missed = snapshots[(batches % steps) % steps_per_execution != 0]
        if missed.size:
            raise inside_execution(int(missed[0]), steps_per_execution)


def inside_execution(update: int, steps_per_execution: int) -> ConfigError:
    """The error for a snapshot that falls inside an execution of several steps."""
    return _inside(
        f"the snapshot at update {update} falls inside an execution of {steps_per_execution} steps"
    )


def _inside(what: str) -> ConfigError:
    fault = Fault(
        "steps_per_execution",
        f"{what}. Compile with steps_per_execution=1, or choose start and every so that every "
        "snapshot falls on the end of an execution.",
    )
    return ConfigError([fault], source="the schedule")


def accumulation_of(model: Any) -> int:
    """Batches per update."""
    return getattr(inner_optimizer(model), "gradient_accumulation_steps", None) or 1
