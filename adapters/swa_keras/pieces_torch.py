"""Many tensors by way of a small scratch, so that nothing of their size is allocated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# 4 MB of float32 (and 16 MB on an accelerator, where a call costs as much as moving some MB).
# Smaller pieces cost calls; larger ones leave the cache.
ELEMENTS = 1 << 20
TIMES_ON_ACCELERATORS = 4


class Piece(NamedTuple):
    """Parts of averages and of weights that go through the scratch together, one-dimensional."""

    averages: list[Tensor]
    weights: list[Tensor]
    rooms: list[Tensor]


class Scratch:
    """Reusable memory, one row for each device and dtype."""

    def __init__(self) -> None:
        self._rows: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def of(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The row; what was in there is lost."""
        row = self._rows.get((device, dtype))
        if row is None:
            # It outlives the block that asks for it, and tensors of inference do not.
            with torch.inference_mode(False):
                row = torch.empty(limit_on(device), dtype=dtype, device=device)
            self._rows[device, dtype] = row
        return row


def limit_on(device: torch.device) -> int:
    """How many elements a scratch has there."""
    return ELEMENTS * (1 if device.type == "cpu" else TIMES_ON_ACCELERATORS)


def in_pieces(pairs: list[tuple[Tensor, Tensor]], scratch: Scratch) -> Iterator[Piece]:
    """Pairs in pieces that fit into the scratch, each with its part of a row of it.

    Args:
      pairs: an average and a weight of one size each; contiguous, and on one device.
      scratch: gives room of the average's dtype.
    """
    kinds = itertools.groupby(pairs, key=lambda pair: (pair[0].device, pair[0].dtype))
    for (device, dtype), group in kinds:
        limit, row = limit_on(device), scratch.of(device, dtype)
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        sizes: list[int] = []
        used = 0
        for average, weight in _cut(group, limit):
            size = average.numel()
            if used + size > limit:
                yield Piece(averages, weights, [*torch.split(row[:used], sizes)])
                averages, weights, sizes, used = [], [], [], 0
            averages.append(average)
            weights.append(weight)
            sizes.append(size)
            used += size
        yield Piece(averages, weights, [*torch.split(row[:used], sizes)])


def _cut(pairs: Iterable[tuple[Tensor, Tensor]], limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    for average, weight in pairs:
        flat = average.view(-1), weight.view(-1)
        if average.numel() <= limit:
            yield flat
        else:
            yield from zip(*(torch.split(tensor, limit) for tensor in flat), strict=True)
