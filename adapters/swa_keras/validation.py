"""Validation inside ``fit`` on the averaged weights.

``fit`` validates through ``model.evaluate``, and Keras' callbacks have no place where this could
be done twice, or undone if it raises (a raise skips ``on_test_end``). So while a ``fit`` runs,
``model.evaluate`` is this wrapper: it knows the calls that come from that ``fit`` by the list of
callbacks that is passed on, leaves all others alone, and gives the training weights back in a
``finally``. The metrics it adds are part of what ``evaluate`` returns, so that every callback
sees them, wherever it stands in the list.

An exception ends a ``fit`` without a word to callbacks, so the wrapper stays until the next one.
It keeps no callback alive, nor its average; and goes when it finds that its callback is gone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras

from swa_core import SWAWarning
from swa_keras.backend import current


class Validation:
    """Stands in for ``model.evaluate`` while a ``fit`` runs.

    Args:
      model: the model in ``fit``.
      callback: the one whose ``fit`` it is.
      both: validate on the training weights too.
      name: what the averaged metrics are called: ``val_<name>_loss``.
      averaged: a method of the callback that gives the context with the average in the model, or
        None where there is none yet.
    """

    def __init__(
        self,
        model: Any,
        callback: keras.callbacks.Callback,
        *,
        both: bool,
        name: str,
        averaged: Callable[[], AbstractContextManager[Any] | None],
    ) -> None:
        self._model = model
        self._callback = weakref.ref(callback)
        self._both = both
        self._prefix = f"{name}_"
        self._averaged = weakref.WeakMethod(averaged)
        self._removed = False
        self._warned = False
        # Before the first validation, so that it is not compiled twice.
        current().keep_in_evaluation(model)
        self._previous = _living(vars(model).get("evaluate"))
        vars(model)["evaluate"] = self

    def __reduce__(self) -> Any:
        # None in a copy of the callback, which is in no fit.
        return type(None), ()

    @property
    def is_over(self) -> bool:
        """Whether there is no ``fit`` any more that it could be called by."""
        return self._removed or self._callback() is None

    def remove(self) -> None:
        """Gives the model its own method back."""
        self._removed = True
        top = _living(vars(self._model).get("evaluate"))
        if top is None:
            vars(self._model).pop("evaluate", None)
        else:
            vars(self._model)["evaluate"] = top

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        averaged = self._averaged()
        if averaged is None or not self._is_ours(kwargs.get("callbacks")):
            if self.is_over:
                self.remove()
            return self._evaluate(*args, **kwargs)
        context = averaged()
        if not self._both:
            if context is None:
                return self._evaluate(*args, **kwargs)
            with context:
                return self._evaluate(*args, **kwargs)
        if hasattr(kwargs.get("x"), "__next__"):
            # What can be read only once is the training weights' first, as without us.
            self._warn_of_generator()
            logs = self._evaluate(*args, **kwargs)
            found = self._evaluate_averaged(context, *args, **kwargs)
        else:
            # Otherwise they come last, so that what a validation leaves behind (the metrics of
            # the model, say) is what it would be without us.
            found = self._evaluate_averaged(context, *args, **kwargs)
            logs = self._evaluate(*args, **kwargs)
        found = logs if found is None else found
        return {**logs, **{f"{self._prefix}{name}": value for name, value in found.items()}}

    def _evaluate_averaged(
        self, context: AbstractContextManager[Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        if context is None:
            return None
        # The user's callbacks see one validation, which is the other.
        nobody = keras.callbacks.CallbackList([], model=self._model)
        with current().forked_random(), context:
            return self._evaluate(*args, **{**kwargs, "callbacks": nobody})

    def _warn_of_generator(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "SWA: the validation data is a generator, which cannot be read twice, so the "
                "average is validated on the batches after those of the training weights. Give "
                'fit a dataset or arrays, or SWA(..., validate="average").',
                SWAWarning,
                stacklevel=4,
            )

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self._model).evaluate(self._model, *args, **kwargs)

    def _is_ours(self, callbacks: Any) -> bool:
        return (
            not self._removed
            and isinstance(callbacks, keras.callbacks.CallbackList)
            and any(callback is self._callback() for callback in callbacks.callbacks)
        )


def _living(top: Any) -> Any:
    """An ``evaluate`` without the wrappers that are over, or None for that of the class."""
    while isinstance(top, Validation) and top.is_over:
        top = top._previous
    return top
