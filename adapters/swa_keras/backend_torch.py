"""Averages as torch tensors: one foreach lerp over all of them, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from swa_keras.backend import Variable, wide


class _TorchBackend:
    def copies(self, variables: Sequence[Variable]) -> list[torch.Tensor]:
        return [
            v.value.detach().to(getattr(torch, wide(v.dtype)), copy=True).contiguous()
            for v in variables
        ]

    @torch.no_grad()
    def lerp(
        self, averages: list[torch.Tensor], variables: Sequence[Variable], weight: float
    ) -> list[torch.Tensor]:
        same: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for average, variable in zip(averages, variables, strict=True):
            value = variable.value.detach()
            if value.dtype == average.dtype:
                lists = same.setdefault(average.dtype, ([], []))
                lists[0].append(average)
                lists[1].append(value)
            else:
                # Half precision: one widened variable at a time, never all of them.
                average.lerp_(value.to(average.dtype), weight)
        for held, new in same.values():
            torch._foreach_lerp_(held, new, weight)
        return averages

    @torch.no_grad()
    def all_finite(self, variables: Sequence[Variable]) -> bool:
        found = [torch.isfinite(v.value).all() for v in variables]
        return bool(torch.stack([flag.to(found[0].device) for flag in found]).all())

    def stash(self, variables: Sequence[Variable]) -> list[torch.Tensor]:
        # Keras assigns in place, so the values have to be copied out first.
        return self.copy_state(variables)

    def copy_state(self, variables: Sequence[Variable]) -> list[torch.Tensor]:
        return [v.value.detach().clone() for v in variables]

    def restore(self, variables: Sequence[Variable], kept: Sequence[torch.Tensor]) -> None:
        self.assign(variables, kept)

    def assign(self, variables: Sequence[Variable], averages: Sequence[torch.Tensor]) -> None:
        for variable, value in zip(variables, averages, strict=True):
            variable.assign(value)

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

    def forked_random(self) -> AbstractContextManager[Any]:
        # Every pass over a DataLoader draws a number, and the training shuffles by the next one.
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else [])

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.no_grad()(function)


make = _TorchBackend
