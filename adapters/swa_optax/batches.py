"""The batches of a data set with their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from swa_core import BatchNormError

Size = Callable[[Any], float]


def weighted(data: Iterable[Any], size: Size | None) -> Iterator[tuple[float, Any]]:
    """The batches that are not empty, with their weights."""
    if isinstance(data, Mapping) or hasattr(data, "shape"):
        raise BatchNormError(
            "the data are one batch, not an iterable of batches.", hint="pass [batch]."
        )
    others: Any = None
    for number, batch in enumerate(data, start=1):
        if size is not None:
            weight = float(size(batch))
            if not 0 <= weight < float("inf"):
                raise BatchNormError(
                    f"size gave {weight} for batch {number}, expected a finite number >= 0."
                )
        else:
            weight, now = _rows(batch, number)
            if others is not None and now != others:
                raise BatchNormError(
                    f"batch {number} has the shapes {now} behind the first axis, after {others}: "
                    "how many elements each layer averages over cannot be told.",
                    hint="say size=, a function of the batch.",
                )
            others = now
        if weight:
            yield weight, batch


def _rows(batch: Any, number: int) -> tuple[float, list[tuple[int, ...]]]:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    shapes = [shape for shape in shapes if shape]
    rows = {shape[0] for shape in shapes}
    if len(rows) != 1:
        raise BatchNormError(
            f"the size of batch {number} cannot be told: the first axes of its arrays have the "
            f"lengths {sorted(rows)}.",
            hint="say size=, a function of the batch.",
        )
    return float(rows.pop()), [shape[1:] for shape in shapes]
