"""Averages and weights change places in memory, without a second copy of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swa_keras.backend import Variable
from swa_keras.pieces_torch import Piece, Scratch, in_pieces


class Loan:
    """Averages that stand in the variables, whose own values wait to return.

    Where both have the same dtype they are exchanged piece by piece: the average's memory holds
    the variable's own value meanwhile. A variable that is narrower than its average cannot hold
    it, so a copy of its value is kept and the average stays where it is. Variables keep their
    memory, so whoever holds it (compiled code, DistributedDataParallel) sees the change.

    Nothing but the variable holds an exchanged average. So an ``assign`` to the variable, and a
    backward pass that gives it a gradient, take a copy of the average first.

    Args:
      variables: whose values are exchanged.
      averages: theirs, contiguous.
      scratch: for what is exchanged.
    """

    def __init__(
        self, variables: Sequence[Variable], averages: Sequence[Tensor], scratch: Scratch
    ) -> None:
        self._variables = variables
        self._weights = [tensor_of(variable).detach() for variable in variables]
        self._homes = list(averages)
        self._scratch = scratch
        # Values that cannot wait in the average's memory, and averages that were taken out.
        self._kept: dict[int, Tensor] = {}
        self._rescued: dict[int, Tensor] = {}
        for index, (home, weight) in enumerate(zip(self._homes, self._weights, strict=True)):
            if not _alike(home, weight):
                self._kept[index] = weight.clone()
        for variable in variables:
            # Of another loan, whose average is what waits now.
            if isinstance(guard := vars(variable).get("_direct_assign"), _Guard):
                guard.rescue()
        self._pieces = self._cut()
        with torch.no_grad():
            self._exchange()
            try:
                for index in self._kept:
                    self._weights[index].copy_(self._homes[index])
            except BaseException:
                self._give_back()
                raise
        torch.clear_autocast_cache()
        self._guards = [_Guard(self, index, variables[index]) for index in self._in_exchange()]
        self._versions = [tensor_of(variable)._version for variable in variables]

    @property
    def live(self) -> list[Tensor]:
        """The variables' own values."""
        return [self._kept.get(index, home) for index, home in enumerate(self._homes)]

    @property
    def averages(self) -> list[Tensor]:
        """The averages, where they are now."""
        return [
            home if index in self._kept else self._rescued.get(index, weight)
            for index, (home, weight) in enumerate(zip(self._homes, self._weights, strict=True))
        ]

    def rescue(self, index: int) -> None:
        """Takes a copy of an average that is about to be overwritten in its variable."""
        if index not in self._rescued:
            self._rescued[index] = self._weights[index].clone()

    @torch.no_grad()
    def undo(self) -> bool:
        """The variables have their own values again. Whether an average was overwritten."""
        was_written = self._was_written()
        self._give_back()
        self._remove_guards()
        torch.clear_autocast_cache()
        return was_written

    @torch.no_grad()
    def keep(self) -> bool:
        """The averages stay in the variables for good, and go on as averages too."""
        was_written = self._was_written()
        for index in self._in_exchange():
            self._homes[index].copy_(self._rescued.get(index, self._weights[index]))
        self._remove_guards()
        return was_written

    def _give_back(self) -> None:
        for index, kept in self._kept.items():
            self._weights[index].copy_(kept)
        for index, average in self._rescued.items():
            self._weights[index].copy_(self._homes[index])
            self._homes[index].copy_(average)
        if self._rescued:
            self._pieces = self._cut()
        self._exchange()
        for variable, weight in zip(self._variables, self._weights, strict=True):
            here = tensor_of(variable)
            if here.data_ptr() != weight.data_ptr():  # model.to() gave it other memory meanwhile
                here.copy_(weight)

    def _in_exchange(self) -> list[int]:
        return [index for index in range(len(self._homes)) if index not in self._kept]

    def _exchange(self) -> None:
        for piece in self._pieces:
            torch._foreach_copy_(piece.rooms, piece.weights)
            torch._foreach_copy_(piece.weights, piece.averages)
            torch._foreach_copy_(piece.averages, piece.rooms)

    def _cut(self) -> list[Piece]:
        """What is exchanged; all at once, so that nothing is allocated after the first moved."""
        pairs = [
            (self._homes[index], self._weights[index])
            for index in self._in_exchange()
            if index not in self._rescued
        ]
        return [*in_pieces(pairs, self._scratch)]

    def _was_written(self) -> bool:
        """Whether an average was written to where no guard could take it out."""
        return any(
            tensor_of(self._variables[index])._version != self._versions[index]
            for index in self._in_exchange()
            if index not in self._rescued
        )

    def _remove_guards(self) -> None:
        for guard in self._guards:
            guard.remove()


class _Guard:
    """Stands in for a variable's ``_direct_assign``, through which Keras assigns."""

    def __init__(self, loan: Loan, index: int, variable: Variable) -> None:
        self._loan, self._index, self._variable = loan, index, variable
        self._previous: Callable[[Any], None] | None = vars(variable).get("_direct_assign")
        vars(variable)["_direct_assign"] = self
        # Optimizers write to the memory itself, but not before there is a gradient.
        tensor = tensor_of(variable)
        self._hook = (
            tensor.register_post_accumulate_grad_hook(lambda _: self.rescue())
            if tensor.requires_grad
            else None
        )

    def __call__(self, value: Any) -> None:
        self.rescue()
        type(self._variable)._direct_assign(self._variable, value)

    def rescue(self) -> None:
        """Takes a copy of the average out of the variable."""
        self._loan.rescue(self._index)

    def remove(self) -> None:
        """The variable is as it was before."""
        if self._previous is None:
            vars(self._variable).pop("_direct_assign", None)
        else:
            vars(self._variable)["_direct_assign"] = self._previous
        if self._hook is not None:
            self._hook.remove()


def tensor_of(variable: Variable) -> Tensor:
    """The parameter of a variable (its ``value`` asks for scopes first, which takes longer)."""
    tensor: Tensor = variable._value
    return tensor


def _alike(average: Tensor, weight: Tensor) -> bool:
    return (
        average.dtype == weight.dtype
        and average.device == weight.device
        and weight.is_contiguous()
        and average.is_contiguous()
    )
