"""Whether weights are finite, without a temporary of their size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite. Reads each tensor once and brings one flag back.

    >>> all_finite([torch.ones(3), torch.zeros(0)]), all_finite([torch.tensor(float("nan"))])
    (True, False)
    """
    elsewhere: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            if not _is_finite(tensor):
                return False
        elif tensor.numel():
            elsewhere.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    flags: dict[torch.device, list[Tensor]] = {}
    for (device, _), alike in elsewhere.items():
        # The largest magnitude: one fused kernel for all of them, and NaN wins in it.
        largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        flags.setdefault(device, []).append(largest.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def _is_finite(tensor: Tensor) -> bool:
    # Of all reductions the sum alone reads every dtype at the speed of memory, and it is NaN or
    # Inf if an element is. One that only overflows is looked at again.
    if math.isfinite(tensor.sum().item()):
        return True
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor))
