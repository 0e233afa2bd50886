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
    flags = []
    for (device, dtype), alike in kinds.items():
        if device.type != "cpu":
            # The largest magnitude: one fused kernel for all tensors, and NaN wins in it.
            probes = list(torch._foreach_norm(alike, float("inf")))
        elif dtype in (torch.float32, torch.float64):
            probes = _products_with_zero(alike)
        else:
            probes = [bound for tensor in alike for bound in torch.aminmax(tensor)]
        flags.append(torch.stack(probes).isfinite().all())
    # One device has one flag to wait for, also where dtypes are mixed.
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(alike).all()) for alike in by_device.values())


def _products_with_zero(tensors: list[Tensor]) -> list[Tensor]:
    """A scalar for each tensor: 0, or NaN where 0 was multiplied by NaN or Inf."""
    # BLAS reads at the speed of memory, three times as fast as torch's own reductions; the zeros
    # are one number with stride 0.
    zero = torch.zeros(1, dtype=tensors[0].dtype)
    return [
        scalar
        for tensor in tensors
        for scalar in (
            (torch.dot(tensor.view(-1), zero.expand(tensor.numel())),)
            if tensor.is_contiguous()
            else torch.aminmax(tensor)
        )
    ]
