"""Averages that stand in a model as the very same arrays, and are not taken away there.

Keras gives a model's arrays to each compiled step for good (donation) and takes new ones from it.
A lent array would be deleted by that. So a step that evaluates or predicts is compiled to return
only what it changes, which needs no donation, and the arrays that it only reads stay what and where
they are. Any other step is given copies while averages are lent.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import keras

from swa_core import SWAError
from swa_keras.backend import Variable

# Functions of models that leave their arguments alone.
_KEEPING: weakref.WeakSet[Any] = weakref.WeakSet()


class Loan:
    """Averages in the place of the variables' values, which wait meanwhile.

    Args:
      variables: whose places they take. Narrower ones hold a rounded copy.
      averages: theirs.

    Attributes:
      live: the variables' own values.
      averages: as given.
    """

    def __init__(self, variables: Sequence[Variable], averages: Sequence[jax.Array]) -> None:
        self._variables = variables
        self.live: list[jax.Array] = [v.value for v in variables]
        self.averages = list(averages)
        self._check()
        _GUARD.add(self)
        try:
            for variable, average in zip(variables, averages, strict=True):
                variable.assign(average if _GUARD.owner else jnp.array(average, copy=True))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> bool:
        """The variables have their own values again. Whether an average was overwritten: never,
        since arrays do not change; but who donates them himself deletes them."""
        for variable, value in zip(self._variables, self.live, strict=True):
            variable.assign(value)
        _GUARD.remove(self)
        self._check()
        return False

    def keep(self) -> bool:
        """The averages stay in the variables for good, as copies that training may take."""
        self._check()
        self.live = []  # so that there is never more than the average and one copy of it
        for variable, average in zip(self._variables, self.averages, strict=True):
            if variable.value is average:
                variable.assign(jnp.array(average, copy=True))
        _GUARD.remove(self)
        return False

    def _check(self) -> None:
        if any(average.is_deleted() for average in self.averages):
            raise SWAError(
                "the average is lost: its arrays stood in the model, and a function that was "
                "compiled with donate_argnums deleted them.",
                hint="inside averaged(), give such a function copies of the model's arrays.",
            )


class _Guard:
    """While averages are lent, Keras' trainers get copies of them for steps that donate."""

    def __init__(self) -> None:
        self._loans: list[Loan] = []
        self._lock = threading.Lock()
        # Every trainer asks this method for the arrays of its next step.
        self.owner = next((c for c in keras.Model.__mro__ if "_get_jax_state" in vars(c)), None)
        self._original: Callable[..., Any] | None = None

    def add(self, loan: Loan) -> None:
        with self._lock:
            self._loans.append(loan)
            if self._original is None and self.owner is not None:
                self._original = self.owner._get_jax_state
                self.owner._get_jax_state = self._guarded(self._original)

    def remove(self, loan: Loan) -> None:
        with self._lock:
            self._loans = [other for other in self._loans if other is not loan]
            if not self._loans and self._original is not None and self.owner is not None:
                self.owner._get_jax_state = self._original
                self._original = None

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def arrays_for_a_step(model: Any, *args: Any, **kwargs: Any) -> Any:
            state = original(model, *args, **kwargs)
            if _leaves_alone(model, **kwargs):
                return state
            arrays = {id(average) for loan in self._loans for average in loan.averages}
            return tuple(
                [jnp.array(a, copy=True) if id(a) in arrays else a for a in group]
                for group in state
            )

        return arrays_for_a_step


_GUARD = _Guard()


def _leaves_alone(
    model: Any,
    trainable_variables: bool = False,
    non_trainable_variables: bool = False,
    optimizer_variables: bool = False,
    metrics_variables: bool = False,
    purge_model_variables: bool = False,
) -> bool:
    """Whether the step that these arrays are for keeps them: it does not train, and is ours."""
    if optimizer_variables:
        return False
    return (model.test_function if metrics_variables else model.predict_function) in _KEEPING


def keep_in_evaluation(model: Any) -> None:
    """Compiles the evaluation and prediction of a model without donation, from their next call on.

    Until ``compile`` is called again, which begins anew in Keras too.
    """
    if _GUARD.owner is None or _nnx():
        return
    if _is_kerass(model, "make_test_function") and model.test_function not in _KEEPING:
        model.test_function = model._make_function(_compiled(model, model.test_step))
        _KEEPING.add(model.test_function)
    if _is_kerass(model, "make_predict_function") and model.predict_function not in _KEEPING:

        def predict_step(state: Any, data: Any) -> Any:
            outputs, non_trainable_variables = model.predict_step(state, data)
            return outputs, (state[0], non_trainable_variables)

        model.predict_function = model._make_function(
            _compiled(model, predict_step), concatenate_outputs=True
        )
        _KEEPING.add(model.predict_function)


def _compiled(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, compiled so that it neither takes nor copies the arrays that it only reads."""
    compiled: Callable[..., Any] | None = None

    def changes(state: Any, data: Any) -> Any:
        outputs, new = step(state, data)
        return outputs, [
            [after if after is not before else None for before, after in zip(*groups, strict=True)]
            for groups in zip(state, new, strict=True)
        ]

    def call(state: Any, data: Any) -> Any:
        nonlocal compiled
        if model.run_eagerly or not model.jit_compile:
            return step(state, data)
        if compiled is None:
            pinned = [[array.sharding for array in group] for group in state]
            is_distributed = keras.distribution.distribution() is not None
            compiled = jax.jit(changes, out_shardings=(None, pinned) if is_distributed else None)
        outputs, new = compiled(state, data)
        return outputs, tuple(
            [before if after is None else after for before, after in zip(*groups, strict=True)]
            for groups in zip(state, new, strict=True)
        )

    return call


def _is_kerass(model: Any, method: str) -> bool:
    """Whether a method is Keras' own, and not of a class of the user's."""
    return getattr(type(model), method) is getattr(_GUARD.owner, method)


def _nnx() -> bool:
    """Whether Keras runs on flax's variables, whose steps are compiled in another way."""
    from keras.src.backend.config import is_nnx_enabled

    return bool(is_nnx_enabled())
