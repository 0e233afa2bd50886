"""Whether weights are finite, without a temporary of their size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite. Reads each tensor once and brings one flag back.

    Args:
      tensors: floating or complex tensors of any shape, dtype and device.

    >>> all_finite([torch.ones(3), torch.zeros(0)]), all_finite([torch.tensor(float("nan"))])
    (True, False)
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            kinds.setdefault((real.device, real.dtype), []).append(real.detach())
    flags: dict[torch.device, list[Tensor]] = {}
    for (device, dtype), alike in kinds.items():
        if device.type != "cpu":
            # The largest magnitude: one fused kernel for all tensors, and NaN wins in it.
            probes = list(torch._foreach_norm(alike, float("inf")))
        elif dtype in (torch.float32, torch.float64):
            probes = _squares(alike)
        else:
            probes = _extremes(alike)
        flags.setdefault(device, []).append(torch.stack(probes).isfinite().all())
    # One device has one flag to wait for, also where dtypes are mixed.
    if all(bool(torch.stack(of_device).all()) for of_device in flags.values()):
        return True
    # Squares of very large numbers overflow, which is no Inf of theirs: look again, exactly.
    return all(bool(torch.stack(_extremes(alike)).isfinite().all()) for alike in kinds.values())


def _squares(tensors: list[Tensor]) -> list[Tensor]:
    """A scalar for each tensor that is finite only if the tensor is."""
    # BLAS reads at the speed of memory, faster than torch's own reductions.
    return [
        torch.dot(tensor.view(-1), tensor.view(-1)) if tensor.is_contiguous() else tensor.norm()
        for tensor in tensors
    ]


def _extremes(tensors: list[Tensor]) -> list[Tensor]:
    """Least and greatest element of each tensor; NaN is both."""
    return [bound for tensor in tensors for bound in torch.aminmax(tensor)]
