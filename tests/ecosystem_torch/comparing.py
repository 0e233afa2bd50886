"""The average of a run that was made without averaging."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def means(snapshots: list[list[Tensor]]) -> list[Tensor]:
    """The average of lists of tensors, computed in float64 and given in float32."""
    return [
        torch.stack(tensors).double().mean(0).float() for tensors in zip(*snapshots, strict=True)
    ]


def close(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether averages agree in dtype, and in value within float32's rounding."""
    return all(
        a.dtype == b.dtype and torch.allclose(a, b, rtol=2e-6, atol=1e-7)
        for a, b in zip(some, others, strict=True)
    )
