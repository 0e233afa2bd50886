"""Counters in int32 that stay at their end instead of wrapping around."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from swa_optax.resolving import LAST_UPDATE


def counter() -> jax.Array:
    """A counter at zero, with a buffer of its own (a shared one could not be donated)."""
    return jnp.zeros((), jnp.int32)


def increment(count: jax.typing.ArrayLike) -> jax.Array:
    """The next number, or the last one that int32 has.

    >>> int(increment(0)), int(increment(2**31 - 1)) == 2**31 - 1
    (1, True)
    """
    return jnp.minimum(count, LAST_UPDATE - 1) + 1
