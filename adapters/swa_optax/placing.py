"""Arrays from the host to where those they replace are, and from any devices to the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from swa_optax.memory import on_host


def placed_like(value: Any, like: Any, dtype: Any = None) -> jax.Array:
    """A copy of ``value`` in the dtype and memory, and on the devices, of the array ``like``.

    It is committed to them, or uncommitted, as ``like`` is, so that a compiled step that took
    ``like`` takes the copy without compiling again.

    Args:
      value: an array of numpy or JAX; where ``like`` lies on several processes, the same in each.
      like: an array, or a number.
      dtype: another than that of ``like``.

    >>> placed_like([1, 2], jnp.zeros(2))
    Array([1., 2.], dtype=float32)
    """
    dtype = jnp.result_type(like) if dtype is None else dtype
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) and not _is_placed(like):
        return jnp.array(value, dtype=dtype, copy=True)
    if isinstance(value, jax.Array):
        return jax.device_put(jnp.array(value, dtype=dtype, copy=True), sharding)
    # Out of numpy's memory each device gets its part: none has to hold the whole. The copy is
    # JAX's own, for it may go on using that memory.
    return jax.device_put(np.array(value, dtype=dtype), sharding)


def _is_placed(array: Any) -> bool:
    """Whether somebody put an array where it is, beside a device or on a certain one."""
    traced = isinstance(array, jax.core.Tracer)  # which JAX has not placed yet
    return on_host(array) or (not traced and getattr(array, "committed", False))


def fetched(array: Any) -> npt.NDArray[Any]:
    """A copy of an array on the host, whole.

    What lies on the devices of several processes is gathered: each of them has to call this.

    >>> fetched(jnp.ones(2))
    array([1., 1.], dtype=float32)
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            array = array.addressable_data(0)
        else:
            # It asks whether the processes run in step, which costs nothing beside the gathering.
            from jax.experimental import multihost_utils

            array = multihost_utils.process_allgather(array, tiled=True)
    return np.array(array)
