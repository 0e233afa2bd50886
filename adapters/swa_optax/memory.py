"""Averages that wait in the memory of the host, beside parameters on a device."""

from __future__ import annotations

from typing import Any, Literal

import jax

MemoryKind = Literal["pinned_host"]


def check_memory_kind(kind: str | None) -> None:
    """Refuses what no average can be kept in.

    Raises:
      ValueError: another kind than "pinned_host", or a JAX that cannot move arrays under jit.
    """
    if kind is None:
        return
    if kind != "pinned_host":
        raise ValueError(
            f'memory_kind must be "pinned_host" or None (with the parameters), got {kind!r}'
        )
    if not hasattr(jax, "memory"):
        raise ValueError(
            'memory_kind="pinned_host" needs a newer JAX, which has jax.memory; this is '
            f"{jax.__version__}"
        )


def to_host(array: jax.Array) -> jax.Array:
    """The array in pinned memory of the host, with the sharding it has; traced ones too."""
    return jax.device_put(array, jax.memory.Space.Host)


def on_host(array: Any) -> bool:
    """Whether an array, traced or not, is in the memory of the host beside a device."""
    space = getattr(jax, "memory", None)
    if space is None:
        return False
    return getattr(jax.typeof(array), "memory_space", None) == space.Space.Host


def to_device(array: Any) -> Any:
    """The array where it can be computed with: itself, unless it waits in the host's memory."""
    return jax.device_put(array, jax.memory.Space.Device) if on_host(array) else array
