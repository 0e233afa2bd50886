"""Counters in int32 that stay at their end instead of wrapping around."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def counted(count: Any) -> jax.Array:
    """A counter in int32, whatever a file or another framework made of it.

    A number beyond int32 becomes the last one, as counting to it would.

    >>> counted(3), counted(2**40) == LAST_UPDATE
    (Array(3, dtype=int32), Array(True, dtype=bool))
    """
    if isinstance(count, (int, np.generic, np.ndarray)):
        # On the host: JAX would take 2**40 for 0, or not at all.
        return jnp.array(min(int(count), LAST_UPDATE), jnp.int32)
    if jnp.iinfo(count.dtype).max > LAST_UPDATE:
        count = jnp.minimum(count, jnp.array(LAST_UPDATE, count.dtype))
    return jnp.asarray(count, jnp.int32)
