"""One step of averaging inside the compiled training step; one small class for each backend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from swa_core import ConfigError, Schedule
from swa_core.averaging import NonFinite
from swa_core.errors import Fault
from swa_core.rules import Rule
from swa_keras.backend import Variable

# Updates are counted in int32, and stay at its end.
LAST_UPDATE = int(np.iinfo(np.int32).max)


class Counters(NamedTuple):
    """Scalar int32 variables of the optimizer.

    Attributes:
      n_updates: completed updates.
      n_averaged: snapshots in the average.
      n_skipped: snapshots left out because they held NaN or Inf.
    """

    n_updates: Variable
    n_averaged: Variable
    n_skipped: Variable


class Plan(NamedTuple):
    """What to do at which update; nothing of it is traced."""

    schedule: Schedule
    rule: Rule
    nonfinite: NonFinite


class Micro(NamedTuple):
    """How the inner optimizer counts the batches of an update.

    Attributes:
      iterations: its own counter, already at the batch that has just been applied.
      per_update: batches per update; of 1, every batch completes one.
    """

    iterations: Variable
    per_update: int

    @property
    def completed(self) -> Any:
        """Whether the batch completed an update: True, or a boolean of the backend."""
        return self.per_update == 1 or self.iterations.value % self.per_update == 0


class InGraph(Protocol):
    """Counts an update and averages its weights if it is a snapshot.

    Called after the inner optimizer in every step, where the backend compiles it with the step.
    """

    def __call__(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        counters: Counters,
        micro: Micro,
    ) -> None: ...


def of_backend(plan: Plan) -> InGraph:
    """The step on the backend that Keras runs on.

    Raises:
      ConfigError: a time that the counters cannot reach.
    """
    late = [
        Fault(f"swa.{name}", f"update {value} is later than the int32 counters reach.")
        for name, value in plan.schedule._asdict().items()
        if value is not None and value > LAST_UPDATE
    ]
    if late:
        raise ConfigError(late, source="the schedule")
    name = keras.backend.backend()
    step: InGraph = importlib.import_module(f"swa_keras.in_graph_{name}").Step(plan)
    return step
