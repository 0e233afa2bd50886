"""Parameters that joined the average at the same snapshot, and the arithmetic on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from swa_core.rules import Rule
from swa_torch.sharding import local

# Half precision passes through a float32 scratch of this many elements (4 MB), and so do weights
# and averages that change places; what fits in the cache costs no pass over memory.
SCRATCH_ELEMENTS = 1 << 20


class Position(NamedTuple):
    """Where a parameter stands in the optimizer. Identities may change, positions do not."""

    group: int
    member: int


def is_averaged(tensor: Tensor) -> bool:
    """Whether tensors of this dtype can be averaged: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an average of such weights is kept in: float32 or wider.

    >>> accumulator_dtype(torch.bfloat16), accumulator_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.float32 if dtype.itemsize < 4 else dtype


class Scratch:
    """Small memory per device and dtype, reused, so that a snapshot allocates nothing."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_pieces": {}}

    def of(self, like: Tensor) -> Tensor:
        """``SCRATCH_ELEMENTS`` elements of the device and dtype of ``like``."""
        key = (like.device, like.dtype)
        if key not in self._pieces:
            self._pieces[key] = torch.empty(SCRATCH_ELEMENTS, dtype=key[1], device=key[0])
        return self._pieces[key]


class Cohort:
    """The averages of parameters with one count between them.

    Nearly every training has one cohort. A parameter group that is added later, or a parameter
    that is unfrozen later, starts another.

    Attributes:
      positions: where the parameters stand.
      parameters: the parameters themselves, as last seen there.
      averages: of what this rank holds of each (see ``sharding``); zeros before the first snapshot.
      dtypes: of the parameters when they joined.
      n_averaged: snapshots in the averages.
      total: the sum of the snapshots' weights relative to the newest; see ``swa_core.rules``.
    """

    def __init__(
        self,
        positions: list[Position],
        parameters: list[Tensor],
        averages: list[Tensor] | None = None,
        n_averaged: int = 0,
        total: float = 0.0,
    ) -> None:
        self.positions = positions
        self.parameters = parameters
        self.dtypes = [parameter.dtype for parameter in parameters]
        self.averages = averages if averages is not None else [*map(_zeros, parameters)]
        self.shapes = [average.shape for average in self.averages]
        self.n_averaged = n_averaged
        self.total = total

    def is_unchanged(self) -> bool:
        """Whether the parameters still are of the shape, dtype and device of their averages."""
        return (
            [local(parameter).shape for parameter in self.parameters] == self.shapes
            and [parameter.dtype for parameter in self.parameters] == self.dtypes
            and all(
                parameter.device == average.device
                for parameter, average in zip(self.parameters, self.averages, strict=True)
            )
        )

    def follow_devices(self) -> None:
        """Moves the averages to where their parameters are now."""
        self.averages = [
            average.to(parameter.device)
            for average, parameter in zip(self.averages, self.parameters, strict=True)
        ]

    def add_snapshot(self, rule: Rule, scratch: Scratch) -> None:
        """The parameters as they are now join the averages."""
        if self.n_averaged:
            self.total = float(rule.retain(float(self.n_averaged)) * self.total + 1.0)
        else:
            self.total = 1.0
        self.n_averaged += 1
        shards = [*map(local, self.parameters)]
        if self.n_averaged == 1:
            if self.averages:
                torch._foreach_copy_(self.averages, shards)
            return
        weight = 1.0 / self.total
        averages: list[Tensor] = []
        parameters: list[Tensor] = []
        narrow: list[tuple[Tensor, Tensor]] = []
        for average, parameter in zip(self.averages, shards, strict=True):
            if average.dtype == parameter.dtype:
                averages.append(average)
                parameters.append(parameter)
            else:
                narrow.append((average, parameter))
        if averages:
            torch._foreach_lerp_(averages, parameters, weight)
        for averages, parameters, room in in_pieces(narrow, scratch):
            torch._foreach_copy_(room, parameters)
            torch._foreach_lerp_(averages, room, weight)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(
        local(parameter), dtype=accumulator_dtype(parameter.dtype), requires_grad=False
    ).detach()


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
    for _, group in kinds:
        batch: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        used = 0
        for average, weight in _cut(group):
            size = average.numel()
            if used and used + size > SCRATCH_ELEMENTS:
                yield batch
                batch, used = ([], [], []), 0
            room = scratch.of(average)[used : used + size].view(average.shape)
            for tensors, tensor in zip(batch, (average, weight, room), strict=True):
                tensors.append(tensor)
            used += size
        if used:
            yield batch


def _cut(pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for average, weight in pairs:
        if average.numel() <= SCRATCH_ELEMENTS:
            yield average, weight
            continue
        rows = SCRATCH_ELEMENTS // (average.numel() // len(average))
        # A single row that does not fit is cut along its own first dimension.
        parts = zip(
            torch.split(average, rows) if rows else average.unbind(),
            torch.split(weight, rows) if rows else weight.unbind(),
            strict=True,
        )
        yield from parts if rows else _cut(parts)
