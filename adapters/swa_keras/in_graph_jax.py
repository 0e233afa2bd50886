"""In jax's train step: one condition over all averages, which XLA updates where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swa_core.rules import Rule
from swa_keras.backend import Variable
from swa_keras.backend_jax import each_finite, finite_sums
from swa_keras.in_graph import LAST_UPDATE, Counters, Micro, Plan

Values = list[jax.Array]


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
        schedule, rule, nonfinite = self._plan
        updates, n_averaged, n_skipped = (counter.value for counter in counters)
        completed = jnp.asarray(micro.completed)
        count = jnp.where(completed, _next(updates), updates)
        due = completed & schedule.is_snapshot(count)
        old, new = [v.value for v in averages], [v.value for v in variables]
        taken = due
        if nonfinite == "skip":
            taken = due & _cond(due, _all_finite, _not_read, new)
        n = _next(n_averaged)
        mixed = _cond(taken, partial(_mixed, rule), _kept, old, new, n)
        counters.n_updates.assign(count)
        counters.n_averaged.assign(jnp.where(taken, n, n_averaged))
        counters.n_skipped.assign(jnp.where(due & ~taken, _next(n_skipped), n_skipped))
        if mixed is not old:
            for average, value in zip(averages, mixed, strict=True):
                average.assign(value)


def _next(count: jax.Array) -> jax.Array:
    return jnp.minimum(count, LAST_UPDATE - 1) + 1


def _cond(condition: jax.Array, yes: Any, no: Any, *operands: Any) -> Any:
    """``lax.cond``; outside of jit without it, since it would compile at every call."""
    if isinstance(condition, jax.core.Tracer):
        return lax.cond(condition, yes, no, *operands)
    return yes(*operands) if condition else no(*operands)


@partial(jax.jit, static_argnums=0)
def _mixed(rule: Rule, old: Values, new: Values, n: jax.Array) -> Values:
    """The average with the n-th snapshot in it."""

    def mix(average: jax.Array, value: jax.Array) -> jax.Array:
        wide = value.astype(average.dtype)
        # Not by the recurrence of ``total``, which drifts in float32.
        weight = rule.mixing_weight(n.astype(average.dtype), expm1=jnp.expm1)
        # The first snapshot is selected: mixing it in by weight 1 would lose its last bits, and
        # turn -0.0 into 0.0.
        return jnp.where(n == 1, wide, average + weight * (wide - average))

    return [mix(average, value) for average, value in zip(old, new, strict=True)]


def _kept(old: Values, new: Values, n: jax.Array) -> Values:
    return old


def _all_finite(new: Values) -> jax.Array:
    # A sum is NaN or infinite if an element is; one that only overflows is looked at again. (XLA's
    # maximum loses NaN on the CPU.)
    return _cond(finite_sums(new), _true, each_finite, new)


def _true(new: Values) -> jax.Array:
    return jnp.array(True)


def _not_read(new: Values) -> jax.Array:
    return jnp.array(False)
