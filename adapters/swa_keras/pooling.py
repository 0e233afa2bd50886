"""Moments of a whole from the moments of its batches, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from swa_keras.backend import current


class Statistics(NamedTuple):
    """The pooled statistics of one layer, float64, a value for each channel."""

    layer: Any
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]


class Pool:
    """Moments of everything one layer has seen, a value for each channel."""

    def __init__(self) -> None:
        self.count: Any = np.zeros(1)
        self.mean: Any = np.zeros(1)
        self.squares: Any = np.zeros(1)  # the sum of squared distances from the mean

    @property
    def reached(self) -> bool:
        """Whether there was anything that was not masked."""
        return bool(self.count.any())

    def add(self, mean: Any, variance: Any, count: Any) -> None:
        """Pools one batch with those before (Chan et al. 1983)."""
        total = self.count + count
        share = np.divide(count, total, out=np.zeros_like(total), where=total > 0)
        distance = mean - self.mean
        self.squares = self.squares + variance * count + distance**2 * self.count * share
        self.mean = self.mean + distance * share
        self.count = total

    def take(self, others: Sequence[tuple[Any, Any, Any]]) -> None:
        """Becomes the pool of others' counts, means and squares."""
        self.count, self.mean, self.squares = np.zeros(1), np.zeros(1), np.zeros(1)
        for count, mean, squares in others:
            self.add(mean, squares / np.maximum(count, 1), count)

    def statistics(self, layer: Any) -> Statistics:
        """The statistics; channels that were masked throughout keep theirs."""
        values = [self.mean, self.squares / np.maximum(self.count, 1)]
        if not self.count.all():
            to_numpy = current().to_numpy
            old = (to_numpy(v.value) for v in (layer.moving_mean, layer.moving_variance))
            values = [np.where(self.count, new, o) for new, o in zip(values, old, strict=True)]
        return Statistics(layer, *(np.reshape(v, tuple(layer.moving_mean.shape)) for v in values))


def add_to(records: list[list[Any]], pools: list[Pool]) -> None:
    """Adds what the layers' calls recorded of one batch."""
    flat = [(pool, call) for pool, calls in zip(pools, records, strict=True) for call in calls]
    if not flat:
        return
    # One tensor brought to the host instead of one for each layer.
    widest = "float64" if any(_is_double(call) for _, call in flat) else "float32"
    joined = current().to_numpy(
        keras.ops.concatenate([keras.ops.cast(call, widest) for _, call in flat], axis=1)
    )
    begin = 0
    for pool, call in flat:
        end = begin + call.shape[1]
        mean, lost, variance, count = joined[:, begin:end].astype(np.float64)
        pool.add(mean + lost, variance, count)
        begin = end


def _is_double(tensor: Any) -> bool:
    return bool(keras.backend.standardize_dtype(tensor.dtype) == "float64")
