"""The batch-norm statistics in a ``State`` of Equinox, known without importing it.

Nothing in a state has a name: its entries stand in the order of the model's layers. Behind a scalar
of its own, a batch norm keeps the pair of its mean and variance. The scalar counts the updates in
mode "batch", where the pair began at (0, 1) and is divided by ``1 - momentum ** counter`` where it
is used. In mode "ema" it is a boolean, and the pair is used as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_optax.paths import Path, Tree, leaves


def is_equinox_state(stats: Tree) -> bool:
    """Whether this is the state of a model of Equinox.

    >>> is_equinox_state({"mean": 0.0, "var": 1.0})
    False
    """
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(stats, equinox.nn.State)


def equinox_pairs(stats: Tree) -> list[tuple[Path, Path]]:
    """The paths of the means, each with that of its variance."""
    return [
        (Path((entry, 0)), Path((entry, 1)))
        for entry, parts in _entries(stats).items()
        if _is_pair(parts) and _count_before(stats, entry) is not None
    ]


def as_kept(stats: Tree, path: Path, new: Any, momentum: Any) -> Any:
    """A statistic as the layer keeps it, so that it is ``new`` where it is used."""
    count = _count_before(stats, path[0])
    if count is None or count.dtype == bool:
        return new
    # In float32, as the layer computes what it divides by.
    base, count = jnp.asarray(momentum, jnp.float32), jnp.asarray(count, jnp.int32)[..., None]
    return new * np.where(count == 0, 1.0, np.float64(1 - base**count))


def _entries(stats: Tree) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for path, leaf in leaves(stats).items():
        found.setdefault(path[0], []).append((path[1:], leaf))
    return found


def _is_pair(parts: list[Any]) -> bool:
    if [place for place, _ in parts] != [(0,), (1,)]:
        return False
    (_, mean), (_, var) = parts
    floating = jnp.issubdtype(mean.dtype, jnp.floating)
    return floating and mean.ndim >= 1 and (mean.shape, mean.dtype) == (var.shape, var.dtype)


def _count_before(stats: Tree, entry: Any) -> jax.Array | None:
    """The counter or flag that stands before the pair of an entry, one for each layer."""
    entries = _entries(stats)
    parts = entries.get(entry - 1, [])
    if len(parts) != 1 or parts[0][0] != ():
        return None
    count: jax.Array = parts[0][1]
    counts = count.dtype == bool or jnp.issubdtype(count.dtype, jnp.integer)
    (_, mean), _ = entries[entry]
    return count if counts and count.shape == mean.shape[:-1] else None
