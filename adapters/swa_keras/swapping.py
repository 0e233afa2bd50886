"""Lending a model the average, and giving its own weights back whatever happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from swa_core import SWAError, SWAWarning
from swa_core.interrupts import uninterrupted
from swa_keras.averages import RunningAverage
from swa_keras.backend import Loan, Tensor, Variable
from swa_keras.model_state import averaged_variables, state_variables, synced
from swa_keras.optimizer_average import OptimizerAverage


class Swap:
    """A model that computes with the average until ``restore`` or ``keep`` is called.

    The running statistics of batch norm, seeds and the like are given back too, so that nothing
    that was done meanwhile reaches the training. The weights and the average take no more memory
    than before (half-precision weights: a copy of them), and Ctrl-C waits while they move.

    Args:
      model: the model, built.
      average: what to lend it; matched with its variables, and holding a snapshot.
      prepare: called with the average in place (to recompute batch-norm statistics).

    Raises:
      StructureError: another model than the one that was averaged.
      BaseException: whatever ``prepare`` raises; the model has its own weights again then.
    """

    def __init__(
        self,
        model: Any,
        average: RunningAverage | OptimizerAverage,
        prepare: Callable[[Any], None] | None,
    ) -> None:
        self._model = synced(model)
        self._backend = average.backend
        self._average = average
        self._weights = averaged_variables(model)
        average.match(self._weights, "cannot swap the average in")
        self._state = state_variables(model)
        self._live_state = self._backend.copy_state(self._state)
        self._loan: Loan | None = None
        self._backend.keep_in_evaluation(model)
        try:
            with uninterrupted():
                self._loan = average.lend(self._weights)
            if prepare is not None:
                prepare(model)
        except BaseException:
            if self._loan is not None:
                self.restore()
            raise

    @property
    def live(self) -> tuple[list[Tensor], list[Tensor]]:
        """The training weights and the state beside them, which wait outside the model."""
        assert self._loan is not None
        return self._loan.live, self._live_state

    @property
    def is_over(self) -> bool:
        """Whether the model has its own weights again, or the average for good."""
        return self._loan is None

    def restore(self) -> None:
        """Gives the model its own weights back."""
        with uninterrupted():
            # An exception inside evaluate() leaves the values outside the variables on jax, from
            # where a later sync would overwrite what is assigned now.
            synced(self._model)
            try:
                was_written = self._average.end()
            except SWAError:
                # The weights are back, and somebody has deleted the average.
                self._give_back_state()
                raise
            self._give_back_state()
        self._warn(was_written, " the training weights are back, but")

    def keep(self) -> None:
        """Leaves the average in the model for good."""
        with uninterrupted():
            synced(self._model)
            was_written = self._average.end(keep=True)
            self._loan = None
        self._warn(was_written, "")

    def _give_back_state(self) -> None:
        self._backend.assign(self._state, self._live_state)
        self._loan = None

    def _warn(self, was_written: bool, result: str) -> None:
        if was_written:
            warnings.warn(
                f"SWA: weights were written to in their memory while the average stood in for "
                f"them:{result} the average now holds what was written. Assign to variables "
                "instead, which leaves the average alone.",
                SWAWarning,
                stacklevel=5,
            )


def live_variables(model: Any) -> tuple[list[Variable], list[Variable]]:
    """The variables that ``Swap.live`` holds the values of, in the same order."""
    return averaged_variables(model), state_variables(model)
