"""The progress of a training whose optimizer averages by itself: read off the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swa_core import StateError, SWAError
from swa_core.saving import read_header
from swa_keras.clock import Timetable
from swa_keras.model_state import synced
from swa_keras.optimizer import SWAOptimizer
from swa_keras.progress import Progress
from swa_keras.saving import Saved
from swa_keras.wrapped_optimizers import chain


class Following(Progress):
    """Takes no snapshots and sets no rate; the optimizer does, in its compiled step.

    Attributes:
      optimizer: whose average it is.
    """

    def __init__(self, optimizer: SWAOptimizer) -> None:
        super().__init__(optimizer.config)
        self.optimizer = optimizer
        self._in_fit = False
        self.timetable = Timetable("update", optimizer.schedule, None)

    @property
    def in_fit(self) -> bool:
        return self._in_fit

    def updates(self, model: Any = None) -> int:
        if model is not None:
            synced(model)
        return self.optimizer.updates

    def begin(self, **lengths: int | None) -> None:
        if any(lengths.values()):
            raise SWAError(
                "the optimizer averages by itself, and its schedule was resolved when it was made.",
                hint="give the lengths to SWAOptimizer(...).",
            )

    def following(self) -> tuple[int, bool]:
        raise SWAError(
            "the optimizer averages by itself, and counts its updates.",
            hint="leave out swa.update(model).",
        )

    def begin_fit(self, model: Any, params: Mapping[str, Any]) -> None:
        self._in_fit = False

    def settle(self, model: Any) -> bool:
        self._in_fit = False
        return False

    def can_look(self, model: Any) -> bool:
        return True

    def begin_epoch(self, model: Callable[[], Any], params: Mapping[str, Any], epoch: int) -> None:
        self._in_fit = True

    def batch_end(self, batch: int) -> bool:
        return False

    def look(self, model: Any) -> bool:
        return False

    def end_epoch(self, *unused: Any) -> bool:
        if self._in_fit:
            self.epochs += 1
        return False

    def end_fit(self) -> None:
        self._in_fit = False

    def take_rate(self, model: Any) -> None:
        pass

    def check(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        if saved.get("unit") == "epoch":
            raise StateError(
                "the saved average counted epochs, and an optimizer counts updates.",
                hint="start a new average.",
            )
        return read_header(saved, self.schedule, self._config.rule)

    def load(self, saved: Mapping[str, Any], updates: int, found: Saved) -> None:
        self.epochs = found.epochs

    def _ticks(self) -> int:
        return self.optimizer.updates


def averaging_optimizer(model: Any) -> SWAOptimizer:
    """The optimizer of a model that averages.

    Raises:
      SWAError: it has none.
    """
    optimizer = getattr(model, "optimizer", None)
    for wrapped in chain(optimizer):
        if isinstance(wrapped, SWAOptimizer):
            return wrapped
    raise SWAError(
        "SWA() without a configuration takes the average of a SWAOptimizer, but the model's "
        f"optimizer is {type(optimizer).__name__}.",
        hint="say SWA(config), or compile the model with swa_keras.SWAOptimizer(optimizer, "
        "config).",
    )
