"""Keeping a learning rate that other callbacks set too."""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import keras
import numpy as np

from swa_core import SWAWarning
from swa_keras.backend import Variable


class RateGuard:
    """Stands in for ``assign`` of an optimizer's rate while a ``fit`` runs.

    Callbacks set the rate at any of their hooks, and Keras does not say in which order they are
    called. So what a callback sets is dropped, with one warning, instead of being set over again
    afterwards, which may be too late for an update. Reading the rate at every batch to notice
    would cost a synchronisation on jax; this costs nothing unless somebody sets it.

    An exception ends a ``fit`` without a word to callbacks. What is set when that ``fit`` no longer
    runs is set, and the guard is gone.

    Args:
      model: the model in ``fit``.
      variable: the rate of its optimizer.
    """

    def __init__(self, model: Any, variable: Variable) -> None:
        self._model = model
        self._variable = variable
        self._rate: float | None = None
        self._warned = False
        callbacks = self._callbacks_of_fit()
        self._callbacks = None if callbacks is None else weakref.ref(callbacks)
        self._assign = variable.assign
        vars(variable)["assign"] = self

    @property
    def stands(self) -> bool:
        """Whether nothing but this guard has set the rate."""
        return vars(self._variable).get("assign") is self

    def set(self, rate: float) -> None:
        """Sets the rate."""
        self._rate = rate
        self._assign(rate)

    def remove(self) -> None:
        """Gives the variable its own method back."""
        if self.stands:
            del vars(self._variable)["assign"]

    def __call__(self, value: Any) -> Any:
        if self._rate is None or self._is_ours(value):
            return self._assign(value)
        known = self._callbacks and self._callbacks()
        if known is None or self._callbacks_of_fit() is not known:
            self.remove()
            return self._assign(value)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SWA: something set the learning rate to {float(value):g}, but from the start of "
                "the averaging on it is that of [swa.lr], and stays so. Leave out the callback "
                "that sets it, or [swa.lr].",
                SWAWarning,
                stacklevel=3,
            )
        return self._variable

    def _is_ours(self, value: Any) -> bool:
        """Whether it changes nothing: Keras itself assigns the value back (on jax, after every
        step that it looks into), and assigns what it is tracing."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return True
        return bool(np.float32(number) == np.float32(self._rate))

    def _callbacks_of_fit(self) -> Any:
        """The list of callbacks of the ``fit`` of this model that calls us, if one does."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is self._model:
                callbacks = frame.f_locals.get("callbacks")
                if isinstance(callbacks, keras.callbacks.CallbackList):
                    return callbacks
            frame = frame.f_back
        return None
