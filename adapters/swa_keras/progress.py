"""How far a training is, when the next snapshot falls due, and at which rate it goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from swa_core import ConfigError, Schedule, StateError, SWAConfig, SWAError, SWAWarning
from swa_core.errors import Fault
from swa_core.saving import read_header
from swa_keras.clock import Timetable, UpdateCounter, accumulation_of, inside_execution, timetable
from swa_keras.learning_rate import Rate, check_same, schedule_of
from swa_keras.model_state import synced
from swa_keras.saving import Saved

NEVER = math.inf


class Progress:
    """The updates and epochs of a training, through any number of calls of ``fit``.

    Models are asked for by functions: on jax, handing one out costs a synchronisation.

    Attributes:
      timetable: the schedule and rate of the first training, which later ones go on by.
      epochs: completed epochs.
    """

    def __init__(self, config: SWAConfig) -> None:
        self._config = config
        self.timetable: Timetable | None = None
        self.epochs = 0
        self._updates = 0
        self._next: float = NEVER
        self._counter: UpdateCounter | None = None
        self._epoch_open = False
        # The updates (or epochs) that this ``fit`` ends at, as far as known.
        self._end: float = NEVER
        self._rate: Rate | None = None
        self._base_rate: float | None = None
        # A loaded state, as far as it waits for the schedule.
        self._unchecked: Mapping[str, Any] | None = None

    @property
    def schedule(self) -> Schedule | None:
        """The snapshots, in the unit of the timetable."""
        return self.timetable and self.timetable.schedule

    @property
    def counts_epochs(self) -> bool:
        """Whether the clock ticks at the ends of epochs alone."""
        return self.timetable is not None and self.timetable.unit == "epoch"

    @property
    def base_rate(self) -> float | None:
        """The learning rate at the start of ``[swa.lr]``, as far as it is known."""
        return self._rate.base if self._rate is not None else self._base_rate

    @property
    def in_fit(self) -> bool:
        """Whether batches of a ``fit`` are being counted."""
        return self._counter is not None

    @property
    def snapshot_to_come(self) -> bool:
        """Whether a snapshot falls into the rest of this ``fit``, as far as its end is known."""
        if self.timetable is None:
            return False
        following = self.timetable.schedule.next_after(self._ticks())
        return following is not None and following <= self._end

    @property
    def end(self) -> str:
        """Where this ``fit`` ends, for messages."""
        return f"{'epoch' if self.counts_epochs else 'update'} {self._end:.0f}"

    def updates(self, model: Any = None) -> int:
        """Completed updates.

        Args:
          model: its optimizer is asked during ``fit``; None gives the last known number.
        """
        if self._counter is not None and model is not None and self.can_look(model):
            self._updates = self._counter.read(strict=False)
        return self._updates

    # Loops without fit

    def begin(self, **lengths: int | None) -> None:
        """Resolves the schedule of a loop of one's own.

        Raises:
          ConfigError: times that cannot be resolved, unless an earlier training told the schedule.
        """
        try:
            schedule = self._config.schedule(**lengths)
            resolved = Timetable("update", schedule, self._config.lr_schedule(**lengths))
        except ConfigError:
            if self.timetable is None or any(lengths.values()):
                raise
            resolved = self.timetable
        self._adopt(resolved)

    def following(self) -> tuple[int, bool]:
        """The update that has just been made, and whether it is a snapshot.

        Raises:
          SWAError: a clock that ticks in epochs, or in batches of a ``fit``.
        """
        if self.counts_epochs:
            raise SWAError(
                "update() counts updates, but this training counts epochs, because its steps per "
                "epoch are not known.",
                hint="give fit steps_per_epoch.",
            )
        if self.in_fit:
            raise SWAError(
                "update() was called during a fit that has this callback, which counts by itself.",
                hint="leave out either; after a fit that an exception ended, call "
                "swa.begin(model) first.",
            )
        update = self._updates + 1
        return update, update >= self._next

    def completed(self, update: int) -> None:
        """Counts an update whose snapshot, if it is one, is taken."""
        self._updates = update
        self._look_ahead()

    # fit

    def begin_fit(self, model: Any, params: Mapping[str, Any]) -> None:
        """Resolves the schedule with what Keras knows of the training.

        Raises:
          ConfigError: times that cannot be resolved; rates inside an execution of several steps.
        """
        if params.get("epochs") == 0:
            return
        try:
            resolved = timetable(
                self._config,
                steps=params.get("steps"),
                epochs=params.get("epochs"),
                accumulation=accumulation_of(model),
            )
        except ConfigError:
            if self.timetable is None:
                raise
            resolved = self.timetable  # which a later fit need not be able to resolve
        scheduled = schedule_of(model.optimizer) is not None
        varies = resolved.lr is not None and bool(resolved.lr.anneal or resolved.lr.cycle)
        if varies and not scheduled and model.steps_per_execution > 1:
            raise ConfigError(
                [
                    Fault(
                        "swa.lr",
                        "anneal and cycle set a rate for every update, which steps_per_execution="
                        f"{model.steps_per_execution} does not allow. Compile with 1, or give the "
                        "optimizer learning_rate=swa_keras.SWASchedule(...).",
                    )
                ],
                source="the schedule",
            )
        self._adopt(resolved)
        self.take_rate(model)

    def settle(self, model: Any) -> bool:
        """Ends the count of a ``fit`` that an exception ended; whether a snapshot is still due."""
        if self._counter is None:
            return False
        can_look = self.can_look(model)
        self._updates = self._counter.read_interrupted()
        self._counter = None
        return can_look and self._updates == self._next

    def begin_epoch(self, model: Callable[[], Any], params: Mapping[str, Any], epoch: int) -> None:
        """Counts from here on; from the first epoch of a ``fit``, since every callback has loaded
        what it wanted to by then."""
        if self._counter is None:
            self._counter = self._counter_of(model(), params, epoch)
        self._counter.new_epoch()
        self._epoch_open = True
        if self._rate is not None:
            self._rate.forget()

    def batch_end(self, batch: int) -> bool:
        """Counts the batches up to this one; whether it is time to ``look``."""
        if self._counter is None:
            return False
        self._counter.batch_end(batch)
        return self._counter.at_most >= self._next

    def can_look(self, model: Any) -> bool:
        """Whether the optimizer can be asked in a ``fit``, or after one that an error ended."""
        synced(model)
        return self._counter is not None and self._counter.is_readable

    def look(self, model: Any) -> bool:
        """Asks the optimizer how many updates are completed; whether a snapshot is due.

        Raises:
          ConfigError: the update of a snapshot is past.
        """
        assert self._counter is not None
        self._updates = self._counter.read()
        if self._updates > self._next:
            raise inside_execution(int(self._next), model.steps_per_execution)
        return self._updates == self._next

    def taken(self) -> None:
        """The snapshot that was due is taken."""
        self._look_ahead()

    def end_epoch(self) -> bool:
        """Ticks, once at each end of an epoch; whether a snapshot falls on it.

        Here the optimizer may be asked: Keras has synced the model, to read its metrics.

        Raises:
          SWAError: an optimizer that makes no updates.
        """
        if not self._epoch_open or self.timetable is None or self._counter is None:
            return False
        self._epoch_open = False
        self.epochs += 1
        self._updates = self._counter.end_epoch()
        if not self.counts_epochs:
            self._counter.refuse_still()
        return self.counts_epochs and bool(self.timetable.schedule.is_snapshot(self.epochs))

    def end_fit(self) -> None:
        """Counts what the last batches brought, from variables that are in place."""
        if self._counter is not None:
            self._updates = self._counter.read(strict=False)
            self._counter = None
        if self._rate is not None:
            self._rate.release()

    # The learning rate

    def take_rate(self, model: Any) -> None:
        """Leaves the rate to an optimizer that has it as a ``SWASchedule``.

        Raises:
          SWAError: that is not of the same ``[swa.lr]``.
        """
        if self.timetable is None or self.timetable.lr is None:
            return
        optimizer = model.optimizer
        if self._rate is not None:
            self._rate.release()
        check_same(optimizer, self.timetable.lr, self.counts_epochs)
        if schedule_of(optimizer) is not None:
            self._rate = None
        elif self._rate is None:
            self._set_up_rate(self.timetable)

    def prepare_batch(self, model: Callable[[], Any]) -> None:
        """Sets the rate of ``[swa.lr]`` for the update of the next batch of ``fit``."""
        if self._counter is None:
            return
        self._counter.batch_begin()
        if self._rate is None:
            return
        if self.counts_epochs:
            update = self.epochs + 1
        elif self._counter.is_exact or self._counter.at_most < self._rate.lr.start:
            update = self._counter.at_most + 1
        else:
            model()
            update = self._counter.read() + 1
        self._rate.prepare(update, model, guarded=True)

    def prepare_next(self, model: Callable[[], Any]) -> None:
        """Sets the rate of the next update of a loop without ``fit``."""
        if self._rate is not None and self.timetable is not None:
            self._rate.prepare(self._ticks() + 1, model)

    # Saving

    def saved(self) -> dict[str, Any]:
        """What a state holds of it beside updates."""
        known = {"epochs": self.epochs, "base_rate": self.base_rate}
        if self._unchecked is not None:
            return {
                "unit": self._unchecked["unit"],
                "schedule": self._unchecked.get("schedule"),
            } | known
        if self.timetable is None:
            return {"unit": None, "schedule": None} | known
        return {"unit": self.timetable.unit, "schedule": [*self.timetable.schedule]} | known

    def check(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The counters of a saved state.

        Raises:
          StateError: it counted something else.
        """
        counters = read_header(saved, self.schedule, self._config.rule)
        _check_unit(saved, self.timetable)
        return counters

    def load(self, saved: Mapping[str, Any], updates: int, found: Saved) -> None:
        """Goes on from a state that was checked."""
        self._updates = updates
        self.epochs = found.epochs
        self._base_rate = found.base_rate
        self._unchecked = saved if self.timetable is None else None
        if self._counter is not None:
            self._counter.restart(updates)
        if self.timetable is not None:
            self._set_up_rate(self.timetable)
            self._look_ahead()

    # Inside

    def _adopt(self, resolved: Timetable) -> None:
        """Takes the schedule of the first training; later ones go on by it."""
        if self._unchecked is not None:
            read_header(self._unchecked, resolved.schedule, self._config.rule)
            _check_unit(self._unchecked, resolved)
            self._unchecked = None
        if self.timetable is None:
            self.timetable = resolved
            self._set_up_rate(resolved)
        elif self.timetable != resolved:
            warnings.warn(
                f"SWA: this training goes on by the schedule of the first one, "
                f"{self.timetable.schedule} in {self.timetable.unit}s, where its own would be "
                f"{resolved.schedule} in {resolved.unit}s.",
                SWAWarning,
                stacklevel=4,
            )
        self._look_ahead()

    def _set_up_rate(self, resolved: Timetable) -> None:
        if resolved.lr is not None:
            self._rate = Rate(resolved.lr, self._base_rate)

    def _ticks(self) -> int:
        return self.epochs if self.counts_epochs else self._updates

    def _look_ahead(self) -> None:
        assert self.timetable is not None
        following = self.timetable.schedule.next_after(self._ticks())
        # Where epochs are counted, nothing falls due at a batch.
        self._next = NEVER if following is None or self.counts_epochs else following

    def _counter_of(self, model: Any, params: Mapping[str, Any], epoch: int) -> UpdateCounter:
        assert self.timetable is not None
        steps = params.get("steps")
        if epoch and not self._updates and not self.epochs:
            # A training that was begun elsewhere.
            if not steps and not self.counts_epochs:
                fault = Fault(
                    "initial_epoch",
                    f"{epoch} epochs are done, but how many updates these were is not known. Give "
                    "fit steps_per_epoch, or load the state that was saved then.",
                )
                raise ConfigError([fault], source="the schedule")
            self.epochs = epoch
            self._updates = epoch * (steps or 0) // accumulation_of(model)
        counter = UpdateCounter(model, self._updates)
        if not self.counts_epochs and steps:
            counter.check_executions(
                self.timetable.schedule,
                steps=steps,
                epochs=(params.get("epochs") or 0) - epoch,
                steps_per_execution=model.steps_per_execution,
            )
        self._look_ahead()
        epochs = max((params.get("epochs") or 0) - epoch, 0)
        self._end = NEVER
        if params.get("epochs") is None:  # a CallbackList of the user's need not know
            return counter
        if self.counts_epochs:
            self._end = self.epochs + epochs
        elif steps:
            self._end = counter.after(epochs * steps)
        return counter


def _check_unit(saved: Mapping[str, Any], resolved: Timetable | None) -> None:
    unit = saved.get("unit")
    if unit is not None and resolved is not None and unit != resolved.unit:
        raise StateError(
            f"the saved average counted {unit}s, and this training counts {resolved.unit}s.",
            hint="give fit the same data and steps_per_epoch as before.",
        )
