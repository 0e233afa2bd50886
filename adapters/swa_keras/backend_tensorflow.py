"""Averages as tf.Variables outside the model: one XLA-compiled lerp over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from swa_keras.backend import Variable, wide

# What TensorFlow raises, before anything has run, where XLA does not serve a device.
_NO_XLA = (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)


class _TensorFlowBackend:
    def __init__(self) -> None:
        self._finite: _Compiled | None = None
        self._lerp: _Compiled | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function cannot be copied or pickled, and is built again when needed.
        return {"_finite": None, "_lerp": None}

    def copies(self, variables: Sequence[Variable]) -> list[tf.Variable]:
        return [
            tf.Variable(tf.cast(tf.identity(v.value), wide(v.dtype)), trainable=False)
            for v in variables
        ]

    def lerp(
        self, averages: list[tf.Variable], variables: Sequence[Variable], weight: float
    ) -> list[tf.Variable]:
        values = [v.value for v in variables]
        if self._lerp is None or not self._lerp.is_of(averages, values):
            self._lerp = _Compiled(_lerp, averages, values)
        self._lerp(tf.constant(weight, tf.float64))
        return averages

    def all_finite(self, variables: Sequence[Variable]) -> bool:
        values = [v.value for v in variables]
        if self._finite is None or not self._finite.is_of(values):
            self._finite = _Compiled(_all_finite, values)
        return bool(self._finite())

    def stash(self, variables: Sequence[Variable]) -> list[tf.Tensor]:
        # No copy: an assignment gives the variable another buffer while this one is held.
        return [tf.identity(v.value) for v in variables]

    copy_state = stash

    def restore(self, variables: Sequence[Variable], kept: Sequence[tf.Tensor]) -> None:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)

    def assign(self, variables: Sequence[Variable], averages: Sequence[tf.Variable]) -> None:
        for variable, average in zip(variables, averages, strict=True):
            variable.assign(tf.identity(average))

    def from_numpy(
        self, arrays: Sequence[npt.NDArray[Any]], variables: Sequence[Variable]
    ) -> list[tf.Variable]:
        return [tf.Variable(array, trainable=False) for array in arrays]

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        return np.array(tensor.numpy())

    def forked_random(self) -> AbstractContextManager[Any]:
        return nullcontext()  # evaluate and forward passes draw none

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        graph: Callable[..., Any] = tf.function(function, autograph=False, reduce_retracing=True)
        return graph


make = _TensorFlowBackend


def _lerp(averages: list[tf.Variable], values: list[tf.Variable], weight: tf.Tensor) -> None:
    for average, value in zip(averages, values, strict=True):
        correction = tf.cast(value, average.dtype) - average
        average.assign_add(correction * tf.cast(weight, average.dtype))


def _all_finite(values: list[tf.Variable]) -> tf.Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in values]))


class _Compiled:
    """A function of lists of variables, compiled for these variables (a tf.function that takes
    variables as arguments is traced anew for every one of them)."""

    def __init__(self, function: Callable[..., Any], *lists: list[tf.Variable]) -> None:
        self._lists = lists
        self._plain = lambda *rest: function(*lists, *rest)
        self._call: Callable[..., Any] | None = None

    def is_of(self, *lists: list[tf.Variable]) -> bool:
        return len(lists) == len(self._lists) and all(
            len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(self._lists, lists, strict=True)
        )

    def __call__(self, *rest: tf.Tensor) -> Any:
        if self._call is not None:
            return self._call(*rest)
        try:
            call = self._traced(rest, jit_compile=True)
            result = call(*rest)
        except _NO_XLA:
            call = self._traced(rest, jit_compile=None)
            result = call(*rest)
        self._call = call
        return result

    def _traced(self, rest: tuple[tf.Tensor, ...], *, jit_compile: bool | None) -> Any:
        function = tf.function(self._plain, jit_compile=jit_compile, autograph=False)
        return function.get_concrete_function(*rest)
