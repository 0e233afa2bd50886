"""Noticing cheaply that tensors are no longer what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Layout:
    """The shapes, dtypes and devices that some tensors have now.

    Args:
      tensors: the tensors; they are not held.

    >>> layout = Layout([torch.zeros(2, 3)])
    >>> layout.holds([torch.ones(2, 3)]), layout.holds([torch.ones(3, 2)])
    (True, False)
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._devices = [tensor.device for tensor in tensors]
        self._glance = _glance(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors, as many of them and in this order, have it."""
        if self._glance is not None and self._glance(*tensors):
            return True
        if (
            [tensor.shape for tensor in tensors] != self._shapes
            or [tensor.dtype for tensor in tensors] != self._dtypes
            or [tensor.device for tensor in tensors] != self._devices
        ):
            return False
        # What the glance has seen (strides, or that a parameter was frozen) is of no concern here.
        self._glance = _glance(tensors)
        return True


def _glance(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """What torch.compile asks before each call: whether tensors still are as they were.

    It is several times faster than comparing attributes, of which each makes a Python object. When
    it says yes, shapes, dtypes and devices are the same; no may have other reasons. Not being
    public, it may be gone in another version; then everything is compared.
    """
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards
        return guards(  # type: ignore[no-any-return]
            *tensors,
            dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],
            dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],
        ).check
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return None
