"""Parameters that joined the average at the same snapshot, and the arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swa_core.rules import Rule
from swa_torch.home import Home
from swa_torch.layout import Layout
from swa_torch.packed import pack
from swa_torch.scratch import Scratch, elements, in_pieces
from swa_torch.sharding import is_sharded, local


class Position(NamedTuple):
    """Where a parameter stands in the optimizer. Identities may change, positions do not."""

    group: int
    member: int


def is_averaged(tensor: Tensor) -> bool:
    """Whether tensors of this dtype can be averaged: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


class Batch(NamedTuple):
    """Averages that are wider than their weights, and room for these in their dtype.

    Attributes:
      averages: as many as fit into the scratch.
      places: of the weights, among those of the cohort.
      room: the parts of the scratch.
    """

    averages: list[Tensor]
    places: list[int]
    room: list[Tensor]


class Cohort:
    """The averages of parameters with one count between them.

    Nearly every training has one cohort. A parameter group that is added later, or a parameter
    that is unfrozen later, starts another.

    Attributes:
      positions: where the parameters stand.
      dtypes: of the parameters when they joined.
      n_averaged: snapshots in the averages.
      total: the sum of the snapshots' weights relative to the newest; see ``swa_core.rules``.
      home: where the averages live.
      is_sharded: whether other ranks hold other parts of any parameter.
    """

    def __init__(
        self,
        positions: list[Position],
        parameters: list[Tensor],
        averages: list[Tensor] | None = None,
        n_averaged: int = 0,
        total: float = 0.0,
        *,
        home: Home | None = None,
    ) -> None:
        self.positions = positions
        self.dtypes = [parameter.dtype for parameter in parameters]
        self.n_averaged = n_averaged
        self.total = total
        self.home = Home() if home is None else home
        self.parameters = parameters
        self._place(averages)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters themselves, as last seen at their positions."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self.is_sharded = any(map(is_sharded, parameters))
        self._layout = Layout(self.weights())

    @property
    def averages(self) -> list[Tensor]:
        """Those of what this rank holds of each (see ``sharding``); zeros before a snapshot.

        They may stand in each other's memory (see ``packed``). What is given instead may be taken
        over or copied.
        """
        return self._averages

    @averages.setter
    def averages(self, averages: list[Tensor]) -> None:
        self._place(averages)

    def weights(self) -> list[Tensor]:
        """What this rank holds of the parameters."""
        return [*map(local, self._parameters)] if self.is_sharded else self._parameters

    def _place(self, given: Sequence[Tensor] | None) -> None:
        """Gives the averages their memory: zeros, or the given ones, which may be taken over."""
        weights = self.weights()
        packed, self._pieces = pack(weights, self.home)
        self._averages: list[Tensor] = []
        # Those of the weights' dtype, and those that are wider, which are not packed.
        self._alike: list[int] = []
        self._wider: list[int] = []
        self._batches: list[Batch] | None = None
        for place, weight in enumerate(weights):
            average = packed.get(place)
            if average is None:
                average = given[place] if given is not None else self.home.zeros(weight)
                (self._alike if average.dtype == weight.dtype else self._wider).append(place)
            elif given is not None:
                average.copy_(given[place])
            self._averages.append(average)

    def __getstate__(self) -> dict[str, Any]:
        # Whole rows: each view of one would be pickled with all of it. No copies: what is sent to
        # another process has to live until it is there.
        packed = {member for piece in self._pieces for member in piece.members}
        alone = [(place, a) for place, a in enumerate(self.averages) if place not in packed]
        return {
            "positions": self.positions,
            "dtypes": self.dtypes,
            "n_averaged": self.n_averaged,
            "total": self.total,
            "home": self.home,
            "parameters": self._parameters,
            "pieces": self._pieces,
            "alone": dict(alone),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        pieces, averages = state.pop("pieces"), state.pop("alone")
        for name, value in state.items():
            setattr(self, name, value)
        weights = self.weights()
        for piece in pieces:
            averages.update(piece.averages(weights))
        self.averages = [averages[place] for place in range(len(weights))]

    def is_unchanged(self) -> bool:
        """Whether the parameters still are of the shapes, dtypes and devices that were seen."""
        return self._layout.holds(self.weights())

    def follow_devices(self) -> None:
        """Moves the averages to where their parameters are now."""
        pairs = [*zip(self.averages, self.weights(), strict=True)]
        if any(average.device != self.home.device_of(weight) for average, weight in pairs):
            self.averages = [average.to(self.home.device_of(weight)) for average, weight in pairs]

    # A snapshot. First all weights are read, to see whether they are finite, and then averaged: in
    # the opposite order, because what was read last may still be in the cache.

    def to_check(self, scratch: Scratch, weights: list[Tensor] | None = None) -> Iterator[Tensor]:
        """The weights, as tensors to be read one after the other: some stand in the scratch.

        Args:
          scratch: where; who reads them all and changes nothing spares ``add_snapshot`` some work.
          weights: copies of the parameters beside the averages; None for the parameters.
        """
        weights = self.weights() if weights is None else weights
        scratch.content = None
        for place in (*reversed(self._wider), *reversed(self._alike)):
            yield weights[place]
        for piece in self._pieces:
            yield piece.gather(weights, scratch)

    def add_snapshot(
        self, rule: Rule, scratch: Scratch, weights: list[Tensor] | None = None
    ) -> None:
        """The parameters as they are now join the averages, or the copies that are given."""
        weights = self.weights() if weights is None else weights
        if self.n_averaged:
            self.total = float(rule.retain(float(self.n_averaged)) * self.total + 1.0)
        else:
            self.total = 1.0
        self.n_averaged += 1
        if self.n_averaged == 1:
            self._copy(weights, scratch)
        else:
            self._mix(weights, scratch, 1.0 / self.total)
        scratch.content = None

    def _copy(self, weights: list[Tensor], scratch: Scratch) -> None:
        for piece in reversed(self._pieces):
            piece.copy(weights, scratch)
        if places := [*self._alike, *self._wider]:
            averages = [self.averages[place] for place in places]
            torch._foreach_copy_(averages, [weights[place] for place in places])

    def _mix(self, weights: list[Tensor], scratch: Scratch, share: float) -> None:
        for piece in reversed(self._pieces):
            piece.mix(weights, scratch, share)
        if self._alike:
            averages = [self.averages[place] for place in self._alike]
            torch._foreach_lerp_(averages, [weights[place] for place in self._alike], share)
        if self._batches is None:
            self._batches = [*self._plan(scratch)]
        for averages, places, room in self._batches:
            torch._foreach_copy_(room, [weights[place] for place in places])
            torch._foreach_lerp_(averages, room, share)
        large = [
            (self.averages[place], weights[place])
            for place in self._wider
            if not _fits(self.averages[place])
        ]
        for averages, narrow, room in in_pieces(large, scratch):
            torch._foreach_copy_(room, narrow)
            torch._foreach_lerp_(averages, room, share)

    def _plan(self, scratch: Scratch) -> Iterator[Batch]:
        """What of the wider averages can be prepared: those whose weights need no cutting."""
        places = [place for place in self._wider if _fits(self.averages[place])]
        averages = [self.averages[place] for place in places]
        left = iter(places)
        for batch, _, room in in_pieces([*zip(averages, averages, strict=True)], scratch):
            yield Batch(batch, [next(left) for _ in batch], room)


def _fits(average: Tensor) -> bool:
    return average.numel() <= elements(average.device)
