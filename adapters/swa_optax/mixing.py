"""One snapshot joins the average: the arithmetic, on lists of leaves in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from swa_core import Rule
from swa_optax.memory import on_host, to_device, to_host

Leaves = list[jax.Array]


def mixed(rule: Rule, old: Leaves, new: Leaves, n: jax.Array) -> Leaves:
    """The average with the n-th snapshot in it, each leaf in the memory where it was."""

    def mix(held: jax.Array, leaf: jax.Array) -> jax.Array:
        average = to_device(held)
        wide = leaf.astype(average.dtype)
        weight = mixing_weight(rule, n, jnp.finfo(average.dtype).dtype).astype(average.dtype)
        # The first snapshot is selected: mixing it in by weight 1 would lose its last bits, and
        # turn -0.0 into 0.0.
        result = jnp.where(n == 1, wide, average + weight * (wide - average))
        return to_host(result) if on_host(held) else result

    return [mix(held, leaf) for held, leaf in zip(old, new, strict=True)]


def kept(old: Leaves, new: Leaves, n: jax.Array) -> Leaves:
    """The average without it."""
    return old


def mixing_weight(rule: Rule, n: jax.Array, dtype: Any) -> jax.Array:
    """The weight of the n-th snapshot as it joins."""
    # Not by the recurrence of ``total``, which drifts in float32.
    weight: Callable[..., jax.Array] = rule.mixing_weight
    return weight(n.astype(dtype), expm1=jnp.expm1)


def total_after(rule: Rule, n: jax.Array) -> jax.Array:
    """The sum of the weights of n snapshots relative to the newest, float32."""
    return 1.0 / mixing_weight(rule, n, jnp.float32)
