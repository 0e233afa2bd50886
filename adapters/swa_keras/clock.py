"""The clock: from Keras' batches and epochs to completed optimizer updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from swa_core import ConfigError, LRSchedule, Schedule, SWAConfig, SWAError
from swa_core.errors import Fault
from swa_core.units import Time
from swa_keras.backend import current
from swa_keras.model_state import inner_optimizer, is_loss_scaled
from swa_keras.wrapped_optimizers import accumulation

Unit = Literal["update", "epoch"]

_UNKNOWN = (
    "the number of steps per epoch is not known. Give fit steps_per_epoch, or say all times in "
    "steps, or all in whole epochs and percentages."
)


_OWN_OPTIMIZER = (
    "if a custom train_step makes its updates otherwise, leave the callback out of fit and call "
    "swa.update(model) after each update."
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
    config: SWAConfig, *, steps: int | None, epochs: int | None, accumulation: int = 1
) -> Timetable:
    """Resolves a configuration with what Keras knows of the training.

    A first snapshot after the end of the training is no fault: a later ``fit`` may go on.

    Args:
      config: what the user wrote.
      steps: batches per epoch; None where the data has no known length.
      epochs: the last epoch of the training.
      accumulation: batches per update. An epoch that is no whole number of updates is rounded
        down, as ``len(loader) // accumulation``.

    Raises:
      ConfigError: times that cannot be resolved.

    >>> timetable(SWAConfig(), steps=10, epochs=4).schedule
    Schedule(start=30, every=10, stop=None)
    >>> timetable(SWAConfig(), steps=None, epochs=4)
    Timetable(unit='epoch', schedule=Schedule(start=3, every=1, stop=None), lr=None)
    """
    times = _times(config)
    unit: Unit = "update"
    per_epoch = total = None
    if steps:
        _check_epochs_hold_updates(times, steps, accumulation)
        per_epoch = steps // accumulation or None
        total = (epochs or 0) * steps // accumulation or None
    elif any(time.unit != "step" for time in times.values()):
        _check_whole_epochs(times, epochs)
        unit, per_epoch, total = "epoch", 1, epochs
    try:
        lengths = {"steps_per_epoch": per_epoch, "total_steps": total}
        return Timetable(unit, config.schedule(**lengths), config.lr_schedule(**lengths))
    except ConfigError as error:
        if total is None or any(fault.path != "swa.start" for fault in error.faults):
            raise
    # All that can be wrong with a start whose lengths are known: the training ends before it.
    # Without shares it can be resolved for a training of any length.
    config = _without_shares(config, times, per_epoch, total)
    lengths["total_steps"] = None
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


def _without_shares(
    config: SWAConfig, times: dict[str, Time], per_epoch: int | None, total: int
) -> SWAConfig:
    """The configuration with the shares of a training of ``total`` updates said in steps."""
    steps = {
        key: time.updates(
            steps_per_epoch=per_epoch,
            total_steps=total,
            whole_epochs=key in ("start", "stop") and times["every"].unit == "ep",
        )
        for key, time in times.items()
        if time.unit == "%"
    }
    changed: dict[str, Any] = {
        key: f"{n}step" for key, n in steps.items() if not key.startswith("lr.")
    }
    if config.lr is not None:
        of_rate = {key[3:]: f"{n}step" for key, n in steps.items() if key.startswith("lr.")}
        changed["lr"] = replace(config.lr, **of_rate)
    return replace(config, **changed)


def _check_epochs_hold_updates(times: dict[str, Time], steps: int, accumulation: int) -> None:
    """Refuses epochs as a measure where gradients are accumulated over more than one."""
    if steps >= accumulation:
        return
    faults = [
        Fault(
            f"swa.{key}",
            f"is counted in epochs, but {steps} batches of an epoch make no update of "
            f"{accumulation} (gradient_accumulation_steps). Say it in steps.",
        )
        for key, time in times.items()
        if time.unit == "ep"
    ]
    if faults:
        raise ConfigError(faults, source="the schedule")


def _check_whole_epochs(times: dict[str, Time], epochs: int | None) -> None:
    """Refuses what a clock that ticks at the ends of epochs cannot tell."""
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

    Raises:
      SWAError: a model without an optimizer.
    """

    def __init__(self, model: Any, done: int) -> None:
        optimizer = inner_optimizer(model)
        if optimizer is None:
            raise SWAError(
                "the model has no optimizer, so updates cannot be counted.", hint=_OWN_OPTIMIZER
            )
        self._accumulation = accumulation_of(model)
        self._may_skip = is_loss_scaled(model)
        # `iterations` is this one divided by the accumulation, which loses the place within it.
        self._iterations = getattr(optimizer, "_iterations", None)
        if self._iterations is None:
            self._iterations = optimizer.iterations
        self._steps = self._read()
        self._base = done - self._steps // self._accumulation
        self._per_execution = model.steps_per_execution
        # Batches that ended since the optimizer was asked; negative if it knew of one before us.
        self._batches = 0
        self._batches_of_fit = 0
        self._has_moved = False
        self._last_batch = -1
        self._in_batch = False

    def new_epoch(self) -> None:
        """Keras numbers the batches of each epoch from 0."""
        self._last_batch = -1

    def batch_begin(self) -> None:
        """Before the first batch of an epoch, goes on from the optimizer as it is: whoever loads
        a checkpoint between two epochs moves its counter, and makes no update."""
        if self._last_batch < 0:
            self.restart(self.at_most)
        self._in_batch = True

    def batch_end(self, batch: int) -> None:
        """Counts the batches up to this one; several have passed with steps_per_execution."""
        passed = batch - self._last_batch
        self._batches += passed
        self._batches_of_fit += passed
        self._last_batch = batch
        self._in_batch = False

    def end_epoch(self) -> int:
        """The updates completed by the end of an epoch. A batch that began, and did not end, is
        the one for which there was no data."""
        self._in_batch = False
        return self.read(strict=False)

    def restart(self, updates: int) -> None:
        """Goes on from so many updates, whatever the optimizer counts."""
        self._steps, self._batches = self._read(), 0
        self._base = updates - self._steps // self._accumulation

    @property
    def at_most(self) -> int:
        """No more updates than these are completed; exact but for skipped updates and for the
        shorter last execution of an epoch with steps_per_execution."""
        return self.after(0)

    def after(self, batches: int) -> int:
        """The updates that are completed after so many more batches, at most."""
        return self._base + (self._steps + self._batches + batches) // self._accumulation

    @property
    def is_exact(self) -> bool:
        """Whether no update can be skipped, so that batches tell the updates."""
        return not self._may_skip

    def refuse_still(self) -> None:
        """Raises ``SWAError`` if the optimizer has made no update at all in a whole epoch."""
        if self._batches_of_fit and not self._has_moved and not self._may_skip:
            raise SWAError(
                f"the optimizer of the model made no update in {self._batches_of_fit} batches, so "
                "updates cannot be counted.",
                hint=_OWN_OPTIMIZER,
            )

    def read(self, *, strict: bool = True) -> int:
        """The completed updates. On jax the model must be synced first.

        Where the optimizer's counter was moved by something else than the batches, these are
        counted: a checkpoint was loaded, or the data ran out (on tensorflow the counter moves
        before an iterator is found empty).

        Raises:
          SWAError: the optimizer makes several updates in a batch (``strict`` only).
        """
        steps = self._read()
        made = steps - self._steps
        self._has_moved = self._has_moved or made != 0
        if strict and made > self._possible:
            raise SWAError(
                f"the optimizer of the model counts {made} updates in {self._possible} batches, "
                "and those inside a batch cannot be seen.",
                hint=f"load checkpoints between epochs; {_OWN_OPTIMIZER}",
            )
        if 0 <= made <= self._possible:
            self._steps, self._batches = steps, min(self._batches - made, 0)
        else:
            self.restart(self.at_most)
        return self._base + self._steps // self._accumulation

    @property
    def is_readable(self) -> bool:
        """Whether the optimizer can be asked. An interrupt in the first step of a ``fit`` leaves
        no values in any variable on jax, and this may be asked with a model that is lost."""
        value = getattr(self._iterations, "_value", 0)
        return value is not None and not getattr(value, "is_deleted", bool)()

    def read_interrupted(self) -> int:
        """The completed updates of a ``fit`` that an exception ended, whoever has trained since."""
        if not self.is_readable:
            return self.at_most
        steps = min(max(self._read(), self._steps), self._steps + self._possible)
        return self._base + steps // self._accumulation

    @property
    def _possible(self) -> int:
        """As many steps may have been made since the optimizer was asked. Callbacks before ours
        in the list ask, or end the training, before we hear of the end of a batch."""
        return self._batches + self._per_execution * self._in_batch

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
        done, end = self.at_most, self.after(epochs * steps)
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
    return accumulation(getattr(model, "optimizer", None))
