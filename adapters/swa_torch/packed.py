"""Averages of small parameters, in one row of memory: a call on the CPU costs more than they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from swa_torch.home import Home
from swa_torch.scratch import Scratch, elements

# Up to here (16 KB of float32) gathering a parameter costs less than a call of its own.
SMALL_ELEMENTS = 1 << 12


class Piece(NamedTuple):
    """Small parameters that are handled together.

    Attributes:
      members: their places among all parameters.
      rows: their averages, one behind the other along the first dimension.
    """

    members: list[int]
    rows: Tensor

    def gather(self, weights: Sequence[Tensor], scratch: Scratch) -> Tensor:
        """These weights side by side in the scratch, in their own dtype; at once if they are there.

        Args:
          weights: of all parameters, the members' on the CPU.
          scratch: gives the room.
        """
        if scratch.content is not None and scratch.content[0] is self:
            return scratch.content[1]
        first = weights[self.members[0]]
        room = scratch.of(first.device, first.dtype)[: self.rows.numel()].view(self.rows.shape)
        torch.cat(self.pick(weights), out=room)
        scratch.content = (self, room)
        return room

    def averages(self, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """The average of each member, by its place; views of the rows."""
        lengths = [len(weights[member]) for member in self.members]
        return dict(zip(self.members, torch.split(self.rows, lengths), strict=True))

    def pick(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The members' among the weights of all parameters."""
        return [*map(weights.__getitem__, self.members)]

    @torch.no_grad()
    def copy(self, weights: Sequence[Tensor], scratch: Scratch) -> None:
        """The averages become the weights."""
        if weights[self.members[0]].dtype == self.rows.dtype:
            torch.cat(self.pick(weights), out=self.rows)
        else:
            self.rows.copy_(self.gather(weights, scratch))

    @torch.no_grad()
    def mix(self, weights: Sequence[Tensor], scratch: Scratch, share: float) -> None:
        """The averages move towards the weights by this share of the way."""
        gathered = self.gather(weights, scratch)
        if gathered.dtype != self.rows.dtype:
            room = scratch.of(gathered.device, self.rows.dtype)[: self.rows.numel()]
            gathered = room.view(self.rows.shape).copy_(gathered)
        self.rows.lerp_(gathered, share)


def is_small(weight: Tensor) -> bool:
    """Whether the average of such a parameter had better be packed, if it is on the CPU.

    >>> is_small(torch.zeros(64)), is_small(torch.zeros(512, 512)), is_small(torch.zeros(()))
    (True, False, False)
    """
    return (
        0 < weight.numel() <= SMALL_ELEMENTS
        and weight.dim() > 0
        and type(weight) in (Tensor, Parameter)
    )


def pack(weights: Sequence[Tensor], home: Home) -> tuple[dict[int, Tensor], list[Piece]]:
    """Averages for the small ones among some parameters; all are zero.

    Args:
      weights: what is averaged, plain tensors of any shape, dtype and device.
      home: where averages live.

    Returns:
      The averages by place among ``weights``, and the pieces in whose memory they stand.
    """
    kinds: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for place, weight in enumerate(weights):
        if home.device_of(weight).type == "cpu" and is_small(weight):
            # Those of one kind can be put one behind the other without a view of each.
            kinds.setdefault((weight.dtype, weight.shape[1:]), []).append(place)
    averages: dict[int, Tensor] = {}
    pieces: list[Piece] = []
    for (dtype, _), places in kinds.items():
        if len(places) < 2:
            continue
        for members in _runs(places, weights):
            length = sum(len(weights[member]) for member in members)
            shape = (length, *weights[members[0]].shape[1:])
            with torch.inference_mode(False):  # it outlives the block
                rows = torch.zeros(shape, dtype=home.dtype_of(dtype), device="cpu")
            piece = Piece(members, rows)
            averages.update(piece.averages(weights))
            pieces.append(piece)
    return averages, pieces


def _runs(places: list[int], weights: Sequence[Tensor]) -> list[list[int]]:
    """The places in runs whose weights fit into the scratch."""
    runs: list[list[int]] = [[]]
    used, limit = 0, elements(torch.device("cpu"))
    for place in places:
        size = weights[place].numel()
        if used and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(place)
        used += size
    return runs


def apart(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: itself, or a copy if it stands in a longer row.

    What is handed out would else keep the whole row alive, and be pickled with all of it.

    >>> row = torch.zeros(100)
    >>> apart(row) is row, apart(row[:5]).untyped_storage().nbytes()
    (True, 20)
    """
    whole = tensor.untyped_storage().nbytes()
    return tensor if whole == tensor.numel() * tensor.element_size() else tensor.clone()
