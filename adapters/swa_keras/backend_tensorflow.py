"""Averages as tf.Variables outside the model: one XLA-compiled lerp over all of them.

An average lies on the device of its variable. With ``tf.distribute`` that is the first replica's
alone, for all replicas hold the same weights; an assignment reaches all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from swa_keras.backend import Variable, wide

# What TensorFlow raises, before anything has run, where XLA does not serve a device.
_NO_XLA = (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)

# A value, or those of the replicas of tf.distribute, which need not agree: each has seeds and
# running statistics of its own.
_Held = tf.Tensor | tuple[tf.Tensor, ...]


class _TensorFlowBackend:
    def __init__(self) -> None:
        self._sums: _Compiled | None = None
        self._finite: _Compiled | None = None
        self._lerp: _Compiled | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function cannot be copied or pickled, and is built again when needed.
        return {"_sums": None, "_finite": None, "_lerp": None}

    def copies(self, variables: Sequence[Variable]) -> list[tf.Variable]:
        return [
            _average(lambda v=v: tf.cast(tf.identity(v.value), wide(v.dtype)), v) for v in variables
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
        # Not by XLA, whose reductions are several times slower on the CPU. A sum is NaN or
        # infinite if an element is; one that only overflows is looked at again.
        if self._sums is None or not self._sums.is_of(values):
            self._sums = _Compiled(_finite_sums, values, by_xla=False)
            self._finite = _Compiled(_all_finite, values, by_xla=False)
        assert self._finite is not None
        return bool(self._sums()) or bool(self._finite())

    def copy_state(self, variables: Sequence[Variable]) -> list[_Held]:
        # No copy: an assignment gives the variable another buffer while this one is held.
        return [_held(v.value) for v in variables]

    def assign(self, variables: Sequence[Variable], values: Sequence[tf.Variable | _Held]) -> None:
        for variable, value in zip(variables, values, strict=True):
            if isinstance(value, tuple):
                for replica, own in zip(_replicas(variable.value), value, strict=True):
                    replica.assign(own)
            else:
                variable.assign(tf.identity(value))

    def keep_in_evaluation(self, model: Any) -> None:
        pass  # it takes nothing away

    def lend(self, variables: Sequence[Variable], averages: list[tf.Variable]) -> _Loan:
        return _Loan(variables, averages)

    def from_numpy(
        self, arrays: Sequence[npt.NDArray[Any]], variables: Sequence[Variable]
    ) -> list[tf.Variable]:
        return [
            _average(lambda array=array: tf.constant(array), v)
            for array, v in zip(arrays, variables, strict=True)
        ]

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        # Of replicas the first, whose values Keras saves too.
        first = tensor[0] if isinstance(tensor, tuple) else tensor
        return np.array(first.numpy())

    def batch(self, array: Any) -> Any:
        return array if keras.ops.is_tensor(array) else keras.ops.convert_to_tensor(array)

    def forked_random(self) -> AbstractContextManager[Any]:
        return nullcontext()  # evaluate and forward passes draw none

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        graph: Callable[..., Any] = tf.function(function, autograph=False, reduce_retracing=True)
        return graph


make = _TensorFlowBackend


class _Loan:
    """Averages in the place of the variables' values, which wait meanwhile.

    Nothing is copied: variable and average share a buffer until one of them is written to, which
    then gets another.
    """

    def __init__(self, variables: Sequence[Variable], averages: list[tf.Variable]) -> None:
        self._variables = variables
        self.averages = averages
        self.live: list[tf.Tensor] = [tf.identity(v.value) for v in variables]
        try:
            self._assign(averages)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> bool:
        self._assign(self.live)
        return False

    def keep(self) -> bool:
        self.live = []
        return False

    def _assign(self, values: Sequence[tf.Variable | tf.Tensor]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(tf.identity(value))


def _held(value: tf.Variable) -> _Held:
    if isinstance(value, tf.distribute.DistributedValues):
        return tuple(map(tf.identity, _replicas(value)))
    return tf.identity(value)


def _replicas(value: tf.Variable) -> Sequence[tf.Variable]:
    """The variables of which a variable of ``tf.distribute`` is made, or the only one."""
    is_distributed = isinstance(value, tf.distribute.DistributedValues)
    return tuple(value.values) if is_distributed else (value,)


def _average(value: Callable[[], tf.Tensor], variable: Variable) -> tf.Variable:
    first = _replicas(variable.value)[0]
    # By the class itself inside the scope of a strategy, where tf.Variable makes one for each
    # replica; not elsewhere, for what the first batch of a model has built is of another class.
    make = type(first) if tf.distribute.has_strategy() else tf.Variable
    with tf.device(first.device):
        return make(value(), trainable=False)


def _lerp(averages: list[tf.Variable], values: list[tf.Variable], weight: tf.Tensor) -> None:
    for average, value in zip(averages, values, strict=True):
        correction = tf.cast(value, average.dtype) - average
        average.assign_add(correction * tf.cast(weight, average.dtype))


def _finite_sums(values: list[tf.Variable]) -> tf.Tensor:
    sums = [tf.cast(tf.reduce_sum(v), tf.float32) for v in values]
    return tf.reduce_all(tf.math.is_finite(tf.stack(sums)))


def _all_finite(values: list[tf.Variable]) -> tf.Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in values]))


class _Compiled:
    """A function of lists of variables, compiled for these variables (a tf.function that takes
    variables as arguments is traced anew for every one of them)."""

    def __init__(
        self, function: Callable[..., Any], *lists: list[tf.Variable], by_xla: bool = True
    ) -> None:
        self._lists = lists
        self._by_xla = by_xla
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
            call = self._traced(rest, jit_compile=self._by_xla or None)
            result = call(*rest)
        except _NO_XLA:
            call = self._traced(rest, jit_compile=None)
            result = call(*rest)
        self._call = call
        return result

    def _traced(self, rest: tuple[tf.Tensor, ...], *, jit_compile: bool | None) -> Any:
        function = tf.function(self._plain, jit_compile=jit_compile, autograph=False)
        return function.get_concrete_function(*rest)
