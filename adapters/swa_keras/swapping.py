"""Lending a model the average, and giving its own weights back whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swa_keras.averages import RunningAverage
from swa_keras.backend import Tensor, Variable
from swa_keras.model_state import averaged_variables, state_variables, synced


class Swap:
    """A model that computes with the average until ``restore`` is called.

    The running statistics of batch norm, seeds and the like are given back too, so that nothing
    that was done meanwhile reaches the training.

    Args:
      model: the model, built.
      average: what to lend it; matched with its variables, and holding a snapshot.
      prepare: called with the average in place (to recompute batch-norm statistics).

    Raises:
      StructureError: another model than the one that was averaged.
      BaseException: whatever ``prepare`` raises; the model has its own weights again then.
    """

    def __init__(
        self, model: Any, average: RunningAverage, prepare: Callable[[Any], None] | None
    ) -> None:
        self._model = synced(model)
        self._backend = average.backend
        self._weights = averaged_variables(model)
        average.match(self._weights, "cannot swap the average in")
        self._state = state_variables(model)
        self._live_state = self._backend.copy_state(self._state)
        self._live_weights = self._backend.stash(self._weights)
        try:
            average.assign_to(self._weights)
            if prepare is not None:
                prepare(model)
        except BaseException:
            self.restore()
            raise

    @property
    def live(self) -> tuple[list[Tensor], list[Tensor]]:
        """The training weights and the state beside them, which wait outside the model."""
        return self._live_weights, self._live_state

    def restore(self) -> None:
        """Gives the model its own weights back."""
        # An exception inside evaluate() leaves the values outside the variables on jax, from
        # where a later sync would overwrite what is assigned now.
        synced(self._model)
        self._backend.restore(self._weights, self._live_weights)
        self._backend.restore(self._state, self._live_state)


def live_variables(model: Any) -> tuple[list[Variable], list[Variable]]:
    """The variables that ``Swap.live`` holds the values of, in the same order."""
    return averaged_variables(model), state_variables(model)
