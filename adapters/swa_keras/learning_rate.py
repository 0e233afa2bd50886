"""The learning rate of ``[swa.lr]`` on a Keras optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from swa_core import LRSchedule, SWAError
from swa_core.learning_rate import learning_rate
from swa_keras.backend import current
from swa_keras.model_state import inner_optimizer


class Rate:
    """Sets the rate of an optimizer before each update, and only where it changes.

    Attributes:
      base: the optimizer's rate at the start, from which ours departs; None before.
    """

    def __init__(self, lr: LRSchedule, base: float | None = None) -> None:
        self.lr = lr
        self.base = base
        self._set: float | None = None

    def forget(self) -> None:
        """Sets the rate again at the next update, in case another callback has changed it."""
        self._set = None

    def prepare(self, update: int, model_of: Callable[[], Any]) -> None:
        """Sets the rate that makes an update.

        Args:
          update: the update to be made; up to the start the rate is left alone.
          model_of: gives the model, synced; not called where there is nothing to set.
        """
        if update <= self.lr.start:
            return
        if self.base is None:
            self.base = _number(model_of().optimizer.learning_rate)
        rate = float(learning_rate(update, self.base, self.lr))
        if rate != self._set:
            model_of().optimizer.learning_rate = rate
            self._set = rate


def check_settable(model: Any) -> None:
    """Refuses optimizers whose rate cannot be set.

    Raises:
      SWAError: no optimizer, or one with a schedule or function as its rate.
    """
    optimizer = inner_optimizer(model)
    if optimizer is None:
        raise SWAError(
            "[swa.lr] sets the learning rate, but the model has no optimizer.",
            hint="compile the model, or leave out [swa.lr] and set the rate yourself.",
        )
    rate = getattr(optimizer, "_learning_rate", None)
    if not isinstance(rate, keras.Variable):
        raise SWAError(
            f"[swa.lr] sets the learning rate, but the optimizer's is a {type(rate).__name__}, "
            "which cannot be set.",
            hint="give the optimizer a float learning_rate, or leave out [swa.lr].",
        )


def _number(rate: Any) -> float:
    return float(current().to_numpy(keras.ops.convert_to_tensor(rate)))
