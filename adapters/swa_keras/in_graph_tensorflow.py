"""In tensorflow's train step, also under ``tf.distribute``: averages are updated in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from swa_keras.backend import Variable
from swa_keras.in_graph import LAST_UPDATE, Counters, Micro, Plan


class Step:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        counters: Counters,
        micro: Micro,
    ) -> None:
        def step(strategy: Any) -> None:
            self._step(
                strategy, [v.value for v in averages], [v.value for v in variables], counters, micro
            )

        # Weights and averages are mirrored, and each replica has its own copy updated. A condition
        # cannot stand in one replica if what it guards concerns all, so we leave them, as Keras'
        # own optimizers do (under no strategy, or one that needs no leaving, this calls `step`).
        tf.__internal__.distribute.interim.maybe_merge_call(step, tf.distribute.get_strategy())

    def _step(
        self,
        strategy: Any,
        averages: Sequence[tf.Variable],
        variables: Sequence[tf.Variable],
        counters: Counters,
        micro: Micro,
    ) -> None:
        schedule, rule, nonfinite = self._plan
        updates, n_averaged, n_skipped = (tf.identity(v.value) for v in counters)
        completed = tf.convert_to_tensor(micro.completed)
        count = tf.where(completed, _next(updates), updates)
        due = completed & schedule.is_snapshot(count)
        taken = due
        if nonfinite == "skip":
            taken = tf.cond(due, lambda: _all_finite(variables), lambda: tf.constant(False))
        n = _next(n_averaged)
        # In float64 on every device that has it, which costs nothing for a number.
        weight = rule.mixing_weight(tf.cast(n, tf.float64), expm1=tf.math.expm1)

        def over_all(update: Callable[..., None]) -> Callable[[], tf.Tensor]:
            def branch() -> tf.Tensor:
                for average, variable in zip(averages, variables, strict=True):
                    strategy.extended.update(average, update, args=(variable, weight), group=False)
                return tf.constant(0)  # a branch must return something

            return branch

        # The first snapshot is copied: mixing it in by weight 1 would lose its last bits.
        branch = tf.where(taken, tf.where(n == 1, 1, 2), 0)
        tf.switch_case(branch, [lambda: tf.constant(0), over_all(_copy), over_all(_mix)])
        counters.n_updates.assign(count)
        counters.n_averaged.assign(tf.where(taken, n, n_averaged))
        counters.n_skipped.assign(tf.where(due & ~taken, _next(n_skipped), n_skipped))


def _next(count: tf.Tensor) -> tf.Tensor:
    return tf.minimum(count, LAST_UPDATE - 1) + 1


def _copy(average: tf.Variable, variable: tf.Variable, weight: tf.Tensor) -> None:
    average.assign(tf.cast(variable, average.dtype))


def _mix(average: tf.Variable, variable: tf.Variable, weight: tf.Tensor) -> None:
    correction = tf.cast(variable, average.dtype) - average
    average.assign_add(correction * tf.cast(weight, average.dtype))


def _all_finite(variables: Sequence[tf.Variable]) -> tf.Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in variables]))
