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
        if _is_pair(parts) and _scalar_before(stats, entry) is not None
    ]


def as_kept(stats: Tree, path: Path, new: Any, momentum: Any) -> Any:
    """A statistic as the layer keeps it, so that it is ``new`` where it is used."""
    count = _scalar_before(stats, path[0])
    if count is None or count.dtype == bool or count == 0:
        return new
    # In float32, as the layer computes what it divides by.
    base = jnp.asarray(momentum, jnp.float32)
    return new * np.float64(1 - base ** jnp.asarray(count, jnp.int32))


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
    return floating and mean.ndim == 1 and (mean.shape, mean.dtype) == (var.shape, var.dtype)


def _scalar_before(stats: Tree, entry: Any) -> jax.Array | None:
    """The counter or flag that stands before an entry."""
    parts = _entries(stats).get(entry - 1, [])
    if len(parts) != 1 or parts[0][0] != ():
        return None
    scalar: jax.Array = parts[0][1]
    counts = scalar.dtype == bool or jnp.issubdtype(scalar.dtype, jnp.integer)
    return scalar if scalar.ndim == 0 and counts else None
