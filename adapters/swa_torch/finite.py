"""Whether weights are finite, without a temporary of their size."""

from __future__ import annotations

import cmath
from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite. Reads each tensor once and brings one flag back.

    Args:
      tensors: floating or complex tensors of any shape, dtype and device. Those on the CPU are
        read as they come, so the next may stand in the same memory.

    >>> all_finite([torch.ones(3), torch.zeros(0)]), all_finite([torch.tensor(float("nan"))])
    (True, False)
    """
    elsewhere: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            if not _is_finite(tensor):
                return False
        elif tensor.numel():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            elsewhere.setdefault((real.device, real.dtype), []).append(real.detach())
    # One device has one flag to wait for, also where dtypes are mixed.
    flags: dict[torch.device, list[Tensor]] = {}
    for (device, _), alike in elsewhere.items():
        # The largest magnitude: one fused kernel for all tensors, and NaN wins in it.
        largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        flags.setdefault(device, []).append(largest.isfinite().all())
    return all(bool(torch.stack(of_device).all()) for of_device in flags.values())


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    # A sum with NaN or Inf in it is NaN or Inf, in whatever order it is taken, and of all
    # reductions it alone reads every dtype at the speed of memory.
    if cmath.isfinite(tensor.sum().item()):
        return True
    # Sums of very large numbers overflow, which is no Inf of theirs: look again, exactly.
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return all(cmath.isfinite(bound.item()) for bound in torch.aminmax(real))
