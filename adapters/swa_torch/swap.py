"""Weights and averages change places, by value and without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from swa_torch.cohort import Cohort, Position
from swa_torch.scratch import Scratch, in_pieces
from swa_torch.sharding import local


class Swap:
    """The averages stand in the parameters, and the live weights wait to return.

    Where both have the same dtype they are exchanged through a small scratch: the average's
    memory holds the live weights meanwhile. A half-precision parameter cannot hold its float32
    average, so a copy of it is kept instead and the average stays where it is; likewise any that
    is narrower than its average or elsewhere. The parameters keep their memory, so whoever else
    holds it (CUDA graphs, compiled code) sees the change.

    Args:
      cohorts: what changes places; those without a snapshot are left alone.
      scratch: for what is exchanged.
      room: gives memory for copies of a cohort's weights, if all of them are to be kept as copies.
    """

    def __init__(
        self,
        cohorts: Iterable[Cohort],
        scratch: Scratch,
        room: Callable[[Cohort], list[Tensor]] | None = None,
    ) -> None:
        self._scratch = scratch
        self._exchanged: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        # A shard does not count who writes to it through its parameter; the parameter does.
        self._watched: list[Tensor] = []
        # Parameters with the memory in which they were found.
        self._places: list[tuple[Tensor, Tensor]] = []
        # Where each side is now, for whoever saves while swapped.
        self.averages: dict[Position, Tensor] = {}
        self.live: dict[Position, Tensor] = {}
        narrow = []
        for cohort in cohorts:
            if not cohort.n_averaged:
                continue
            rooms = [None] * len(cohort.averages) if room is None else room(cohort)
            # Detached: a shard is no leaf, so writing to it must not be asked of autograd.
            weights = [weight.detach() for weight in cohort.weights()]
            members = zip(
                cohort.positions, cohort.averages, weights, rooms, cohort.parameters, strict=True
            )
            for position, average, weight, kept, watched in members:
                self._places.append((watched, weight))
                is_alike = average.dtype == weight.dtype and average.device == weight.device
                if kept is None and is_alike:
                    self._watched.append(watched)
                    self._exchanged.append((average, weight))
                    self.averages[position], self.live[position] = weight, average
                else:
                    narrow.append((average, weight))
                    kept = weight.clone() if kept is None else kept.copy_(weight)
                    self._kept.append((kept, weight))
                    self.averages[position], self.live[position] = average, kept
        with torch.no_grad():
            self._exchange()
            try:
                for average, parameter in narrow:
                    parameter.copy_(average)
            except BaseException:
                self._restore_kept()
                self._exchange(back=True)
                raise
        self.overlook_writes()
        torch.clear_autocast_cache()

    def overlook_writes(self) -> None:
        """Takes what was written to the averages in the parameters until now for nobody's."""
        self._versions = [parameter._version for parameter in self._watched]

    @torch.no_grad()
    def undo(self) -> bool:
        """The live weights return. Whether somebody wrote to the averages in their place."""
        was_written = [parameter._version for parameter in self._watched] != self._versions
        self._restore_kept()
        self._exchange(back=True)
        self._follow()
        torch.clear_autocast_cache()
        return was_written

    @torch.no_grad()
    def keep(self) -> bool:
        """The averages stay in the parameters for good, and go on as averages too."""
        was_written = [parameter._version for parameter in self._watched] != self._versions
        for average, parameter in self._exchanged:
            average.copy_(parameter)
        return was_written

    def _restore_kept(self) -> None:
        for kept, parameter in self._kept:
            parameter.copy_(kept)

    def _follow(self) -> None:
        """Brings the live weights to parameters that were given other memory meanwhile."""
        for parameter, weight in self._places:
            here = local(parameter)
            is_elsewhere = (here.data_ptr(), here.device) != (weight.data_ptr(), weight.device)
            if is_elsewhere and here.shape == weight.shape:
                here.detach().copy_(weight)

    def _exchange(self, *, back: bool = False) -> None:
        """Both sides change places, all of them or none.

        Args:
          back: in the opposite order, which is not the same for parameters that share memory.
        """
        pieces = [*in_pieces(self._exchanged, self._scratch)]
        if back:
            pieces.reverse()
        done = []
        try:
            for piece in pieces:
                _exchange(*piece)
                done.append(piece)
        except BaseException:
            for piece in reversed(done):
                _exchange(*piece)
            raise


def _exchange(averages: list[Tensor], parameters: list[Tensor], room: list[Tensor]) -> None:
    torch._foreach_copy_(room, parameters)
    torch._foreach_copy_(parameters, averages)
    torch._foreach_copy_(averages, room)
