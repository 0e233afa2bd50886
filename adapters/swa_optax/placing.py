"""Putting arrays from the host where those they replace are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from swa_optax.memory import on_host


def placed_like(value: Any, like: Any) -> jax.Array:
    """A copy of ``value`` in the dtype, memory and ``NamedSharding`` of the array ``like``.

    An array without one stays uncommitted, as JAX makes them, so that a compiled step that took
    ``like`` takes the copy without compiling again.

    >>> placed_like([1, 2], jnp.zeros(2))
    Array([1., 2.], dtype=float32)
    """
    array = jnp.array(value, dtype=jnp.result_type(like), copy=True)
    sharding = getattr(like, "sharding", None)
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.device_put(array, sharding) if named or on_host(like) else array
