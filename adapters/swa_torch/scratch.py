"""Small memory that is used again and again, so that a snapshot allocates nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

# What half precision passes through, small parameters are gathered in, and weights and averages
# that change places go by (4 MB of float32). Much smaller pieces cost calls and the processor's
# looking ahead in memory; larger ones leave the cache.
SCRATCH_ELEMENTS = 1 << 20
# On an accelerator a call costs as much as moving some MB.
TIMES_ON_ACCELERATORS = 4


class Scratch:
    """Reusable memory per device and dtype.

    Attributes:
      content: who has gathered something into it last, and where it stands, for whoever would
        gather it again; None if it may have been overwritten since.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.content: tuple[object, Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_pieces": {}, "content": None}

    def of(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``elements(device)`` elements in one row; what was in there is lost."""
        self.content = None
        key = (device, dtype)
        if key not in self._pieces:
            # It outlives the block that asks for it, and tensors of inference do not.
            with torch.inference_mode(False):
                self._pieces[key] = torch.empty(elements(device), dtype=dtype, device=device)
        return self._pieces[key]


def elements(device: torch.device) -> int:
    """How many elements a scratch has there."""
    return SCRATCH_ELEMENTS * (1 if device.type == "cpu" else TIMES_ON_ACCELERATORS)


def in_pieces(
    pairs: list[tuple[Tensor, Tensor]], scratch: Scratch
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """The pairs in batches that fit into the scratch, each with its part of the scratch.

    Large tensors are cut along their first dimensions, so any memory layout will do.

    Args:
      pairs: an average and a weight of one shape each.
      scratch: gives room of the average's dtype.

    Yields:
      Averages, weights and room, three lists of tensors of the same shapes.
    """
    kinds = itertools.groupby(pairs, key=lambda pair: (pair[0].device, pair[0].dtype))
    for (device, dtype), group in kinds:
        limit = elements(device)
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        sizes: list[int] = []
        used = 0
        for average, weight in _cut(group, limit):
            size = average.numel()
            if used and used + size > limit:
                yield averages, weights, _rooms(averages, sizes, scratch.of(device, dtype))
                averages, weights, sizes, used = [], [], [], 0
            averages.append(average)
            weights.append(weight)
            sizes.append(size)
            used += size
        if averages:
            yield averages, weights, _rooms(averages, sizes, scratch.of(device, dtype))


def _rooms(averages: list[Tensor], sizes: list[int], row: Tensor) -> list[Tensor]:
    # Cutting the row at once costs less than taking slices of it.
    rooms = torch.split(row[: sum(sizes)], sizes)
    return [
        room if average.dim() == 1 else laid_out(room, average)
        for room, average in zip(rooms, averages, strict=True)
    ]


def laid_out(row: Tensor, like: Tensor) -> Tensor:
    """A view of a row of memory in the shape of a tensor, and in its layout if that has no gaps.

    Copying between tensors of one layout goes from end to end.

    >>> laid_out(torch.arange(6), torch.zeros(2, 3).t()).stride()
    (1, 3)
    """
    if like.is_contiguous():
        return row.view(like.shape)
    strides = torch.empty_like(like, device="meta").stride()
    return row.as_strided(like.shape, strides, row.storage_offset())


def _cut(pairs: Iterator[tuple[Tensor, Tensor]], limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    for average, weight in pairs:
        if average.numel() <= limit:
            yield average, weight
            continue
        rows = limit // (average.numel() // len(average))
        # A single row that does not fit is cut along its own first dimension.
        parts = zip(
            torch.split(average, rows) if rows else average.unbind(),
            torch.split(weight, rows) if rows else weight.unbind(),
            strict=True,
        )
        yield from parts if rows else _cut(parts, limit)
