"""Averages as torch tensors: one foreach lerp over all of them, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import torch

from swa_keras.backend import Variable, wide
from swa_keras.finite_torch import all_finite
from swa_keras.loan_torch import Loan, tensor_of
from swa_keras.pieces_torch import Scratch, in_pieces


class _TorchBackend:
    def __init__(self) -> None:
        self._scratch = Scratch()

    def __getstate__(self) -> dict[str, Any]:
        return {"_scratch": Scratch()}  # whose content is of no use to anybody else

    def copies(self, variables: Sequence[Variable]) -> list[torch.Tensor]:
        return [
            tensor_of(v)
            .detach()
            .to(getattr(torch, wide(v.dtype)), copy=True, memory_format=torch.contiguous_format)
            for v in variables
        ]

    @torch.no_grad()
    def lerp(
        self, averages: list[torch.Tensor], variables: Sequence[Variable], weight: float
    ) -> list[torch.Tensor]:
        same: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        narrow = []
        averages = _beside(averages, variables)
        for average, variable in zip(averages, variables, strict=True):
            value = tensor_of(variable)
            if value.dtype == average.dtype:
                lists = same.setdefault(average.dtype, ([], []))
                lists[0].append(average)
                lists[1].append(value)
            elif value.is_contiguous():
                narrow.append((average, value))
            else:
                average.lerp_(value.to(average.dtype), weight)
        for held, new in same.values():
            torch._foreach_lerp_(held, new, weight)
        # Half precision is widened on its way through a small scratch.
        for piece in in_pieces(narrow, self._scratch):
            torch._foreach_copy_(piece.rooms, piece.weights)
            torch._foreach_lerp_(piece.averages, piece.rooms, weight)
        return averages

    def all_finite(self, variables: Sequence[Variable]) -> bool:
        return all_finite([tensor_of(v) for v in variables])

    def copy_state(self, variables: Sequence[Variable]) -> list[torch.Tensor]:
        return [v.value.detach().clone() for v in variables]

    def assign(self, variables: Sequence[Variable], values: Sequence[torch.Tensor]) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def keep_in_evaluation(self, model: Any) -> None:
        pass  # it takes nothing away

    def lend(self, variables: Sequence[Variable], averages: list[torch.Tensor]) -> Loan:
        return Loan(variables, averages, self._scratch)

    def from_numpy(
        self, arrays: Sequence[npt.NDArray[Any]], variables: Sequence[Variable]
    ) -> list[torch.Tensor]:
        return [
            torch.tensor(array, device=v.value.device)
            for array, v in zip(arrays, variables, strict=True)
        ]

    def to_numpy(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        if tensor.dtype == torch.bfloat16:  # which torch does not hand to numpy
            tensor = tensor.float()
        return np.array(tensor.detach().cpu().numpy())

    def batch(self, array: Any) -> Any:
        return array if keras.ops.is_tensor(array) else keras.ops.convert_to_tensor(array)

    def forked_random(self) -> AbstractContextManager[Any]:
        # Every pass over a DataLoader draws a number, and the training shuffles by the next one.
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else [])

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.no_grad()(function)


def _beside(averages: Sequence[torch.Tensor], variables: Sequence[Variable]) -> list[torch.Tensor]:
    """The averages where the variables are, should the model have been moved since."""
    return [
        average.to(tensor_of(variable).device)
        for average, variable in zip(averages, variables, strict=True)
    ]


make = _TorchBackend
