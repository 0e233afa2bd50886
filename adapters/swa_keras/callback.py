"""The callback: stochastic weight averaging in ``model.fit``."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import keras
import numpy.typing as npt

from swa_core import (
    ConfigError,
    NothingAveragedError,
    Schedule,
    StateError,
    SWAConfig,
    SWAError,
    SwappedError,
    SWAState,
    SWAWarning,
)
from swa_core.errors import Fault
from swa_core.saving import header, read_header
from swa_keras import batch_norm
from swa_keras.averages import RunningAverage, refuse_nothing
from swa_keras.backend import wide
from swa_keras.clock import Timetable, UpdateCounter, accumulation_of, inside_execution, timetable
from swa_keras.learning_rate import Rate, check_settable
from swa_keras.model_state import averaged_variables, inner_optimizer, synced
from swa_keras.saving import check_live, live_of, plain, progress_of
from swa_keras.swapping import Swap, live_variables
from swa_keras.validation import Validation

Validate = Literal["both", "average", "raw"]
NEVER = math.inf


class SWA(keras.callbacks.Callback):
    """Averages the weights of a model along its training.

    Add it to ``fit`` on the tensorflow, jax or torch backend. How long the training is comes from
    Keras. Snapshots are taken after the scheduled optimizer updates (with gradient accumulation
    the completed ones, with loss scaling those that were not left out), the training itself is
    not changed, and ``fit`` ends with the averaged weights in the model.

    Where Keras does not know the number of steps per epoch, times in epochs and percentages are
    counted at the ends of epochs. Several calls of ``fit`` with one callback go on counting, by
    the schedule of the first; ``initial_epoch`` counts as epochs done.

    Batch norm: the running statistics belong to the training weights. With ``bn_data`` they are
    recomputed for the average, which costs one forward pass over ``bn_data`` for every validation
    on a changed average and for the final weights. Without it the average is used with the
    statistics of the training weights, which is often much worse; a warning says so.

    Args:
      config: a ``SWAConfig``, a mapping of its fields, or the path of a file with ``[swa]``.
      bn_data: training data for the batch-norm statistics, in any form that ``update_bn`` takes
        and that can be read more than once.
      validate: what ``fit`` validates: "both" logs the training weights as ``val_*`` and the
        average as ``val_swa_*`` (equal to ``val_*`` before the first snapshot), reading the
        validation data twice (to monitor them, tell the callback which way is better:
        ``EarlyStopping("val_swa_loss", mode="min")``); "average" logs the average as ``val_*``;
        "raw" leaves validation alone.
      finalize: whether ``fit`` ends with the average in the model. If False, use ``averaged`` and
        ``finalize``.

    Raises:
      ConfigError: everything wrong with the configuration; later, at the start of ``fit``, times
        that cannot be resolved or snapshots inside an execution of several steps.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1.

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> swa = SWA({"start": "50%", "every": "1ep"})
    >>> x, y = np.ones((8, 2)), np.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=2, epochs=4, callbacks=[swa], verbose=0)
    >>> swa.schedule, swa.n_averaged
    (Schedule(start=8, every=4, stop=None), 3)
    """

    def __init__(
        self,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        bn_data: Any = None,
        validate: Validate = "both",
        finalize: bool = True,
    ) -> None:
        super().__init__()
        self.config = SWAConfig.of(config)
        if faults := _faults(bn_data, validate):
            raise ConfigError(faults, source="SWA(...)")
        self._bn_data = bn_data
        self._validate = validate
        self._finalize_at_end = finalize
        self._average = RunningAverage(self.config.rule, self.config.nonfinite)
        self._timetable: Timetable | None = None
        self._rate: Rate | None = None
        self._updates = 0
        self._epochs = 0
        self._next: float = NEVER
        self._counter: UpdateCounter | None = None
        self._validation: Validation | None = None
        self._swap: Swap | None = None
        # A loaded state, as far as it waits for the schedule and for a built model.
        self._unchecked: Mapping[str, Any] | None = None
        self._live_to_load: tuple[list[Any], list[Any]] | None = None
        # What update_bn found for the average of so many snapshots, of this model.
        self._statistics: tuple[int, Any, list[batch_norm.Statistics]] | None = None
        self._warned_empty = False
        self._warned_batch_norm = False

    @property
    def schedule(self) -> Schedule | None:
        """Which updates are snapshots, known from the start of the training on; in epochs where
        Keras does not know the number of steps per epoch."""
        return self._timetable and self._timetable.schedule

    @property
    def updates(self) -> int:
        """Completed optimizer updates. During ``fit`` it asks the optimizer, which on jax brings
        the model's variables up to date."""
        if self._counter is not None:
            synced(self._model)
            self._updates = self._counter.read(strict=False)
        return self._updates

    @property
    def n_averaged(self) -> int:
        """The number of snapshots in the average."""
        return self._average.n_averaged

    @property
    def n_skipped(self) -> int:
        """The number of snapshots left out because they held NaN or Inf."""
        return self._average.n_skipped

    @property
    def averaged_weights(self) -> list[npt.NDArray[Any]]:
        """Copies of the averages, float32 or wider, in the order of ``model.trainable_variables``.

        Before the first snapshot these are the live weights, and a warning says so once.
        """
        if self.n_averaged:
            return self._average.arrays()
        variables = averaged_variables(self._model_or(None))
        self._warn_empty()
        return [
            self._average.backend.to_numpy(keras.ops.cast(v.value, wide(v.dtype)))
            for v in variables
        ]

    # Loops without fit

    def begin(
        self,
        model: keras.Model,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Starts a training in a loop of one's own; then call ``update`` after each update.

        Args:
          model: the model to be trained.
          steps_per_epoch: updates per epoch, where the configuration counts epochs.
          total_steps: updates in all, where it has percentages.

        Raises:
          ConfigError: a length that the configuration needs is missing.
        """
        self._refuse_swapped("begin a training")
        self.set_model(model)
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self._check(model)
        self._adopt(
            Timetable("update", self.config.schedule(**lengths), self.config.lr_schedule(**lengths))
        )
        self._warn_batch_norm(model)
        self._load_into(model)
        self._prepare_rate(self._updates + 1)

    def update(self, model: keras.Model) -> None:
        """Counts one completed optimizer update in a loop without ``fit``.

        Call it after every ``train_on_batch`` or step of a custom loop that completed an update.
        Without ``begin`` the configuration must be in steps.

        Args:
          model: the model that was updated, with its values in its variables (on jax, after a
            stateless step, assign them first).

        Raises:
          SwappedError: inside ``averaged()``.
          StructureError: another model than before; the average stays as it was.

        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> swa = SWA({"start": "2step", "every": "2step"})
        >>> for _ in range(5):
        ...     loss = model.train_on_batch(np.ones((8, 2)), np.ones((8, 1)))
        ...     swa.update(model)
        >>> swa.n_averaged
        2
        """
        self._refuse_swapped("count an update")
        if self._timetable is None:
            self.begin(model)
        assert self._timetable is not None
        if self._timetable.unit == "epoch":
            raise SWAError(
                "update() counts updates, but this training counts epochs, because its steps per "
                "epoch are not known.",
                hint="give fit steps_per_epoch.",
            )
        update = self._updates + 1
        if update >= self._next:
            self._average.add(averaged_variables(synced(model)), update)
        self._updates = update
        self._look_ahead(update)
        self._prepare_rate(update + 1)

    # The hooks of fit

    def on_train_begin(self, logs: Any = None) -> None:
        """Resolves the schedule, and refuses what cannot work."""
        self._refuse_swapped("train")
        model = self.model
        self._check(model)
        params = self.params or {}
        try:
            resolved = timetable(
                self.config,
                steps=params.get("steps"),
                epochs=params.get("epochs"),
                accumulation=accumulation_of(model),
                goes_on=bool(self._updates),
            )
        except ConfigError:
            if self._timetable is None:
                raise
            resolved = self._timetable  # which a later fit need not be able to resolve
        if self._rate_varies(resolved) and model.steps_per_execution > 1:
            raise ConfigError(
                [
                    Fault(
                        "swa.lr",
                        "anneal and cycle set a rate for every update, which steps_per_execution="
                        f"{model.steps_per_execution} does not allow. Compile with 1.",
                    )
                ],
                source="the schedule",
            )
        self._adopt(resolved)
        self._warn_batch_norm(model)
        if model.built:
            refuse_nothing(averaged_variables(model), "cannot train with averaging")
            self._average.match(averaged_variables(model), "cannot go on averaging")
        self._counter = None
        if self._validate != "raw":
            self._remove_validation()
            self._validation = Validation(
                model, self, both=self._validate == "both", averaged=self._context_for_validation
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts counting with the first epoch of a ``fit``, after every callback has loaded what
        it wanted to."""
        if self._counter is None:
            self._start_counting(epoch)
        assert self._counter is not None
        self._counter.new_epoch()
        self._epoch_open = True
        if self._rate is not None:
            self._rate.forget()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the learning rate of ``[swa.lr]``."""
        if self._rate is None or self._counter is None or self._timetable is None:
            return
        if self._timetable.unit == "epoch":
            update = self._epochs + 1
        elif self._counter.is_exact or self._counter.at_most < self._rate.lr.start:
            update = self._counter.at_most + 1
        else:
            synced(self._model)
            update = self._counter.read() + 1
        self._prepare_rate(update)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Takes the snapshot if one is due; otherwise only counts."""
        counter = self._counter
        if counter is None:
            return
        counter.batch_end(batch)
        if counter.at_most >= self._next:
            self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Takes the snapshot of a training whose clock ticks in epochs."""
        self._end_epoch()

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the average in the model, if asked to."""
        self._remove_validation()
        if self._counter is not None:
            self._updates = self._counter.read(strict=False)
            self._counter = None
        if not self._finalize_at_end:
            return
        if self.n_averaged:
            self.finalize()
        else:
            skipped = f" ({self.n_skipped} held NaN or Inf)" if self.n_skipped else ""
            warnings.warn(
                f"SWA: no snapshot was averaged in {self._updates} updates{skipped}; the model "
                f"keeps its training weights. The schedule is {self.schedule}.",
                SWAWarning,
                stacklevel=2,
            )

    # Using the average

    @contextmanager
    def averaged(self, model: keras.Model | None = None, bn_data: Any = None) -> Iterator[Any]:
        """A context in which the model computes with the averaged weights.

        Whatever is raised inside, the training weights are back afterwards, and with them the
        batch-norm statistics, seeds and other state of the layers. With nothing averaged yet the
        model keeps its live weights, and a warning says so once.

        Args:
          model: the model; by default the one in training.
          bn_data: recompute the batch-norm statistics on it; by default the callback's.

        Yields:
          The model.

        Raises:
          SwappedError: inside another ``averaged()``.
          StructureError: another model than the one that was averaged.
        """
        model = self._model_or(model)
        self._refuse_swapped("swap the average in")
        if not self.n_averaged:
            self._warn_empty()
            yield model
            return
        self._swap = Swap(model, self._average, self._recompute(bn_data))
        try:
            yield model
        finally:
            self._swap.restore()
            self._swap = None

    def finalize(self, model: keras.Model | None = None, bn_data: Any = None) -> None:
        """Makes the average the model's weights for good.

        Args:
          model: the model; by default the one in training.
          bn_data: recompute the batch-norm statistics on it; by default the callback's.

        Raises:
          NothingAveragedError: before the first snapshot.
          SwappedError: inside ``averaged()``.
          StructureError: another model than the one that was averaged. After any error the model
            has the weights it had.
        """
        self._refuse_swapped("finalize")
        if not self.n_averaged:
            skipped = f", {self.n_skipped} left out as not finite" if self.n_skipped else ""
            schedule = f" (the schedule is {self.schedule})" if self.schedule else ""
            raise NothingAveragedError(
                f"finalize(): nothing is averaged yet after {self._updates} updates{skipped}.",
                hint=f"train past the first snapshot{schedule}, or start the average sooner.",
            )
        Swap(self._model_or(model), self._average, self._recompute(bn_data))

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on averaging: plain Python values and numpy arrays.

        Save it together with the model's and the optimizer's weights. Saved inside
        ``averaged()`` it holds the training weights too, and gives them back when loaded.
        """
        if self._counter is not None and self._swap is None:
            synced(self._model)
            # A snapshot that is due belongs to the updates that are saved.
            self._look()
        state = SWAState(self._updates, self.n_averaged, self.n_skipped, self._average.total, None)
        live = None
        if self._swap is not None:
            to_numpy = self._average.backend.to_numpy
            live = tuple([plain(to_numpy(tensor)) for tensor in kept] for kept in self._swap.live)
        elif self._live_to_load is not None:
            live = self._live_to_load
        return {
            **header(state, self.schedule, self.config.rule),
            "unit": self._timetable and self._timetable.unit,
            "epochs": self._epochs,
            "base_rate": self._rate and self._rate.base,
            "paths": self._average.paths,
            "average": self._average.arrays(),
            "live": None if live is None else {"weights": live[0], "state": live[1]},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state; load the model's and the optimizer's weights first.

        May be called before ``fit``; what depends on the model and on the lengths of the training
        is then checked and applied when ``fit`` starts.

        Args:
          saved: what ``state_dict`` returned.

        Raises:
          StateError: truncated, damaged, newer, or of another schedule or rule.
          StructureError: of other weights. After any error nothing has changed.
        """
        self._refuse_swapped("load a state")
        counters = read_header(saved, self.schedule, self.config.rule)
        self._check_unit(saved, self._timetable)
        progress, live = progress_of(saved), live_of(saved)
        average = RunningAverage(self.config.rule, self.config.nonfinite)
        average.load(counters, saved)
        model = self._model
        if model is not None and model.built:
            average.match(averaged_variables(synced(model)), "cannot load the saved average")
            if live is not None:
                check_live(model, live)
        self._average = average
        self._updates = counters["updates"]
        self._epochs = progress.epochs
        self._statistics = None
        self._unchecked = saved if self._timetable is None else None
        self._live_to_load = live
        self._base_rate = progress.base_rate
        if self._timetable is not None:
            self._set_up_rate(self._timetable)
            self._look_ahead(self._ticks(self._timetable))
        if model is not None and model.built:
            self._load_into(model)
            if self._timetable is not None:
                self._prepare_rate(self._ticks(self._timetable) + 1)

    # Inside

    _base_rate: float | None = None
    _epoch_open = False

    def _check(self, model: Any) -> None:
        """Refuses optimizers that this callback cannot work with."""
        if getattr(inner_optimizer(model), "use_ema", False):
            raise SWAError(
                "the optimizer has use_ema=True: Keras then overwrites the weights with an average "
                "of its own at the end of training, before this callback averages or finalizes.",
                hint='use use_ema=False and, for an EMA, rule = { name = "ema", decay = 0.999 }; '
                "SwapEMAWeights is not needed then.",
            )
        if self.config.lr is not None:
            check_settable(model)

    def _adopt(self, resolved: Timetable) -> None:
        """Takes the schedule of the first training; later ones go on by it."""
        if self._unchecked is not None:
            read_header(self._unchecked, resolved.schedule, self.config.rule)
            self._check_unit(self._unchecked, resolved)
            self._unchecked = None
        if self._timetable is None:
            self._timetable = resolved
            self._set_up_rate(resolved)
        elif self._timetable != resolved:
            warnings.warn(
                f"SWA: this training goes on by the schedule of the first one, "
                f"{self._timetable.schedule} in {self._timetable.unit}s, where its own would be "
                f"{resolved.schedule} in {resolved.unit}s.",
                SWAWarning,
                stacklevel=2,
            )
        self._look_ahead(self._ticks(self._timetable))

    def _set_up_rate(self, resolved: Timetable) -> None:
        if resolved.lr is not None:
            self._rate = Rate(resolved.lr, self._base_rate)

    @staticmethod
    def _rate_varies(resolved: Timetable) -> bool:
        return resolved.lr is not None and bool(resolved.lr.anneal or resolved.lr.cycle)

    @staticmethod
    def _check_unit(saved: Mapping[str, Any], resolved: Timetable | None) -> None:
        unit = saved.get("unit")
        if unit is not None and resolved is not None and unit != resolved.unit:
            raise StateError(
                f"the saved average counted {unit}s, and this training counts {resolved.unit}s.",
                hint="give fit the same data and steps_per_epoch as before.",
            )

    def _ticks(self, resolved: Timetable) -> int:
        return self._epochs if resolved.unit == "epoch" else self._updates

    def _look_ahead(self, ticks: int) -> None:
        assert self._timetable is not None
        following = self._timetable.schedule.next_after(ticks)
        self._next = NEVER if following is None else following

    def _start_counting(self, epoch: int) -> None:
        """The base of the count, at the first epoch of a ``fit``."""
        assert self._timetable is not None
        model = self.model
        if model.built:
            self._load_into(model)
        elif self._live_to_load is not None:
            raise StateError(
                "the loaded state holds the training weights of a model, and this one is not "
                "built.",
                hint="call the model on a batch and load its weights before fit.",
            )
        params = self.params or {}
        steps = params.get("steps")
        if epoch and not self._updates and not self._epochs:
            # A training that was begun elsewhere.
            self._epochs = epoch
            self._updates = epoch * (steps or 0) // accumulation_of(model)
        self._counter = UpdateCounter(model, self._updates)
        if self._timetable.unit == "update" and steps:
            self._counter.check_executions(
                self._timetable.schedule,
                steps=steps,
                epochs=(params.get("epochs") or 0) - epoch,
                steps_per_execution=model.steps_per_execution,
            )
        self._look_ahead(self._ticks(self._timetable))
        if self._timetable.unit == "epoch":
            self._next = NEVER  # nothing falls due at a batch

    def _look(self) -> None:
        """Asks the optimizer how many updates are completed, and takes the snapshot if due."""
        assert self._counter is not None
        model = self.model
        self._updates = self._counter.read()
        if self._updates < self._next:
            return
        if self._updates > self._next:
            raise inside_execution(int(self._next), model.steps_per_execution)
        self._average.add(averaged_variables(model), self._updates)
        self._look_ahead(self._updates)

    def _end_epoch(self) -> None:
        """Ticks a clock that counts epochs, once at each end."""
        if not self._epoch_open or self._timetable is None:
            return
        self._epoch_open = False
        self._epochs += 1
        if not (self.params or {}).get("steps") and self._counter is not None:
            synced(self._model)
            self._counter.data_ran_out()
        if self._timetable.unit == "epoch" and self._timetable.schedule.is_snapshot(self._epochs):
            model = self.model
            assert self._counter is not None
            self._updates = self._counter.read(strict=False)
            self._average.add(averaged_variables(model), self._updates)

    def _context_for_validation(self) -> AbstractContextManager[Any] | None:
        # Validation comes before on_epoch_end, and must see the snapshot of this epoch.
        self._end_epoch()
        return self.averaged() if self.n_averaged else None

    def _remove_validation(self) -> None:
        if self._validation is not None:
            self._validation.remove()
            self._validation = None

    def _prepare_rate(self, update: int) -> None:
        if self._rate is not None:
            self._rate.prepare(update, lambda: self.model)

    def _recompute(self, bn_data: Any) -> Any:
        """What makes the batch-norm statistics those of the average, or None."""
        if bn_data is not None:
            return lambda model: batch_norm.update_bn(model, bn_data)
        if self._bn_data is None:
            return None

        def recompute(model: Any) -> None:
            # Only a new snapshot makes new statistics, so one pass serves until then.
            if not batch_norm.has_batch_norm(model):
                return
            kept = self._statistics
            if kept is None or kept[0] != self.n_averaged or kept[1] is not model:
                found = batch_norm.pooled_statistics(model, self._bn_data)
                kept = self._statistics = (self.n_averaged, model, found)
            batch_norm.assign(kept[2])

        return recompute

    def _load_into(self, model: Any) -> None:
        """Applies what a loaded state holds for the model."""
        self._average.match(averaged_variables(model), "cannot load the saved average")
        if self._live_to_load is not None:
            check_live(model, self._live_to_load)
            for variables, values in zip(live_variables(model), self._live_to_load, strict=True):
                for variable, value in zip(variables, values, strict=True):
                    variable.assign(value)
            self._live_to_load = None

    def _model_or(self, model: Any) -> Any:
        model = self.model if model is None else synced(model)
        if model is None:
            raise SWAError(
                "there is no model yet.", hint="pass it, or train with this callback first."
            )
        if not model.built:
            raise SWAError(
                "the model is not built, so it has no weights yet.",
                hint="call it on a batch of data first.",
            )
        return model

    def _refuse_swapped(self, what: str) -> None:
        if self._swap is not None:
            raise SwappedError(
                f"cannot {what} inside averaged(): the model holds the average there.",
                hint="leave the with-block first.",
            )

    def _warn_empty(self) -> None:
        if not self._warned_empty:
            self._warned_empty = True
            warnings.warn(
                "SWA: nothing is averaged yet; these are the live weights.",
                SWAWarning,
                stacklevel=4,
            )

    def _warn_batch_norm(self, model: Any) -> None:
        uses_average = self._finalize_at_end or self._validate != "raw"
        if (
            self._bn_data is None
            and uses_average
            and not self._warned_batch_norm
            and batch_norm.has_batch_norm(model)
        ):
            self._warned_batch_norm = True
            warnings.warn(
                "SWA: the model has batch norm, whose running statistics do not fit the averaged "
                "weights. Pass SWA(..., bn_data=training_data), or call "
                "swa_keras.update_bn(model, training_data) after the training.",
                SWAWarning,
                stacklevel=3,
            )


def _faults(bn_data: Any, validate: Any) -> list[Fault]:
    faults = []
    if validate not in ("both", "average", "raw"):
        faults.append(Fault("validate", f'expected "both", "average" or "raw", got {validate!r}.'))
    if hasattr(bn_data, "__next__"):
        faults.append(
            Fault(
                "bn_data",
                "a generator can be read only once, and every validation reads the data. Pass "
                "arrays, a dataset, or list(...) of it.",
            )
        )
    return faults
