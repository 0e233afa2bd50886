"""Using an average: reading it, lending it to a model for a while, giving it for good."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy.typing as npt

from swa_core import NothingAveragedError, Schedule, SWAError, SwappedError, SWAWarning
from swa_keras import batch_norm
from swa_keras.averages import RunningAverage
from swa_keras.backend import Variable, current, wide
from swa_keras.model_state import synced
from swa_keras.optimizer_average import OptimizerAverage
from swa_keras.pooling import Statistics
from swa_keras.ranks_torch import unwrapped
from swa_keras.swapping import Swap


class Lender:
    """Lends an average to models.

    Args:
      average: what is lent.
      bn_data: training data for the batch-norm statistics of models that hold the average, or
        None to leave the statistics alone.

    Attributes:
      average: as above; a loaded state puts another in its place.
    """

    def __init__(self, average: RunningAverage | OptimizerAverage, bn_data: Any = None) -> None:
        self.average = average
        self._bn_data = bn_data
        # What update_bn found for the average of so many snapshots, of this model.
        self._statistics: tuple[int, Any, list[Statistics]] | None = None
        self._recalibration: batch_norm.Recalibration | None = None
        self._warned_empty = False

    @property
    def swap(self) -> Swap | None:
        """What the model that holds the average right now must be given back, or None.

        It is the average's, for that of an optimizer is lent by the optimizer and by callbacks.
        """
        swap: Swap | None = self.average.swap
        return swap

    def take(self, average: RunningAverage | OptimizerAverage) -> None:
        """Lends this average from now on."""
        self.average = average
        self._statistics = None

    def weights(self, live: Callable[[], Sequence[Variable]]) -> list[npt.NDArray[Any]]:
        """Copies of the averages; of the live weights, with one warning, before there are any."""
        if self.average.n_averaged:
            return self.average.arrays()
        variables = live()
        self._warn_empty()
        return [current().to_numpy(keras.ops.cast(v.value, wide(v.dtype))) for v in variables]

    @contextmanager
    def averaged(self, model: Any, bn_data: Any = None, *, update_bn: bool = True) -> Iterator[Any]:
        """A context in which the model computes with the average; see ``SWA.averaged``.

        Args:
          model: the model, built.
          bn_data: as there.
          update_bn: False leaves the batch-norm statistics alone.
        """
        self.refuse_swapped("swap the average in")
        if not self.average.n_averaged:
            self._warn_empty()
            yield model
            return
        recompute = self._recompute(model, bn_data) if update_bn else None
        swap = self.average.swap = Swap(unwrapped(model), self.average, recompute)
        try:
            with self._training_refused(unwrapped(model)):
                yield model
        finally:
            try:
                swap.restore()
            finally:  # a Ctrl-C that waited for the end is raised at the end
                if swap.is_over:
                    self.average.swap = None

    def finalize(
        self, model: Any, bn_data: Any = None, *, updates: int, schedule: Schedule | None
    ) -> None:
        """Makes the average the model's weights; see ``SWA.finalize``.

        Args:
          model: the model, built.
          bn_data: as there.
          updates: completed updates, for the message when nothing is averaged.
          schedule: for the same.
        """
        self.refuse_swapped("finalize")
        if not self.average.n_averaged:
            n = self.average.n_skipped
            skipped = f", {n} left out as not finite" if n else ""
            known = f" (the schedule is {schedule})" if schedule else ""
            raise NothingAveragedError(
                f"finalize(): nothing is averaged yet after {updates} updates{skipped}.",
                hint=f"train past the first snapshot{known}, or start the average sooner.",
            )
        Swap(unwrapped(model), self.average, self._recompute(model, bn_data)).keep()

    def _training_refused(self, model: Any) -> AbstractContextManager[None]:
        # Training there would move an optimizer's average, and not only the model.
        by_optimizer = isinstance(self.average, OptimizerAverage)
        return _refused(model, self.refuse_swapped) if by_optimizer else nullcontext()

    def refuse_swapped(self, what: str) -> None:
        """Raises ``SwappedError`` while a model holds the average."""
        if self.swap is not None:
            raise SwappedError(
                f"cannot {what} inside averaged(): the model holds the average there.",
                hint="leave the with-block first.",
            )

    def _recompute(self, model: Any, bn_data: Any) -> Callable[[Any], None] | None:
        """What makes the batch-norm statistics those of the average, or None."""
        if bn_data is not None:
            return lambda _: batch_norm.update_bn(model, bn_data, verbose=0)
        if self._bn_data is None:
            return None

        def recompute(inner: Any) -> None:
            # Only a new snapshot makes new statistics, so one pass serves until then.
            if not batch_norm.has_batch_norm(inner):
                return
            kept = self._statistics
            if kept is None or kept[0] != self.average.n_averaged or kept[1] is not model:
                if self._recalibration is None or not self._recalibration.serves(model):
                    self._recalibration = batch_norm.Recalibration(model)
                found = self._recalibration.statistics(self._bn_data)
                kept = self._statistics = (self.average.n_averaged, model, found)
            batch_norm.assign(kept[2])

        return recompute

    def _warn_empty(self) -> None:
        if not self._warned_empty:
            self._warned_empty = True
            warnings.warn(
                "SWA: nothing is averaged yet; these are the live weights.",
                SWAWarning,
                stacklevel=5,
            )


@contextmanager
def _refused(model: Any, refuse: Callable[[str], None]) -> Iterator[None]:
    """A context in which every training of the model is refused at its beginning.

    What ``fit`` and ``train_on_batch`` call first is stood in for; a step that was compiled long
    before would ask nobody.
    """
    own = vars(model).get("make_train_function")
    vars(model)["make_train_function"] = lambda *_, **__: refuse("train")
    try:
        yield
    finally:
        if own is None:
            vars(model).pop("make_train_function", None)
        else:
            vars(model)["make_train_function"] = own


def usable(model: Any) -> Any:
    """The model, wrapped or not, with its values in its variables.

    Raises:
      SWAError: no model, or one without weights yet.
    """
    if model is None:
        raise SWAError("there is no model yet.", hint="pass it, or train with this callback first.")
    if not unwrapped(model).built:
        raise SWAError(
            "the model is not built, so it has no weights yet.",
            hint="call it on a batch of data first.",
        )
    synced(unwrapped(model))
    return model
