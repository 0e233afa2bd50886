"""Mean and variance of data that comes in pieces, as if it had come at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Values looked at in one go. On the CPU they stay in the cache from the first sum to the second;
# elsewhere the bound is on the float64 copy (128 MB), and a larger one only saves launches.
_PIECE_ON_CPU = 2**19
_PIECE = 2**24
# Up to here what is done costs little beside that it is done, and float64 does it in fewer steps.
_FEW = 2**14


class Pool:
    """The pooled statistics of what one layer has seen, per channel; on the layer's device.

    Nothing here waits for the device: counts come from shapes, and all else stays a tensor.

    Args:
      name: the layer's, for messages.

    >>> pool = Pool("norm")
    >>> pool.add(torch.tensor([[1.0], [2.0]]))
    >>> pool.add(torch.tensor([[6.0]]))
    >>> pool.count, pool.batches, pool.mean, pool.variance()
    (3, 2, tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0  # values per channel
        self.batches = 0
        # Whether the layer normalises with what it has, whatever its training flag says.
        self.is_fixed = False
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # summed squared deviations from the mean

    def add(self, values: Tensor) -> None:
        """Takes in one batch [batch, channels, ...], of any floating dtype and memory format."""
        if not values.numel():
            return
        for piece in _pieces(values.detach()):
            # torch's var_mean is 5 to 15 times slower on the CPU than two sums (it divides once
            # for each value). Elsewhere the sums would make float64 copies of their own.
            if piece.device.type == "cpu":
                self._add_sums(piece)
            else:
                self.merge(_count(piece), *moments(piece))
        self.batches += 1

    def _add_sums(self, values: Tensor) -> None:
        """Takes in values by the sums of their deviations from the mean so far, and of the squares.

        With N values before and n new ones whose deviations sum to s and their squares to q:
        mean += s / (N + n), squares += q - s^2 / (N + n). Where n is not much larger than N this
        cancels nothing; the first values are taken about their own mean.
        """
        count, flat, axes = _count(values), *_flat(values)
        if not self.count:
            self.mean = flat.mean(axes, dtype=torch.float64)
            self.squares = torch.zeros_like(self.mean)
        # Many deviations from about the mean may be as narrow as the values (but not narrower
        # than float32): that loses 2^-24 of each at most, and most are exact. They are added in
        # float64.
        narrow = torch.promote_types(values.dtype, torch.float32)
        about = self.mean if values.numel() <= _FEW else self.mean.to(narrow)
        apart = flat - (about if flat.dim() == 2 else about[:, None])
        total = apart.sum(axes, dtype=torch.float64)
        squares = apart.square_().sum(axes, dtype=torch.float64)
        if about.dtype != self.mean.dtype:
            gap = about - self.mean
            squares.addcmul_(gap, total, value=2).addcmul_(gap, gap, value=count)
            total.add_(gap, alpha=count)
        self.count += count
        self.mean.add_(total, alpha=1 / self.count)
        self.squares.add_(squares).addcmul_(total, total, value=-1 / self.count)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Takes in the statistics of ``count`` more values.

        Source:
          Chan, Golub & LeVeque 1983: E[var + mean^2] - mean^2 in a form that cancels nothing.
        """
        if not count:
            return
        if not self.count:
            self.mean, self.squares = mean, squares
        else:
            share = count / (self.count + count)
            apart = mean - self.mean
            self.mean = self.mean.add(apart, alpha=share)
            self.squares = (self.squares + squares).addcmul_(apart, apart, value=self.count * share)
        self.count += count

    def variance(self) -> Tensor:
        """The unbiased variance, as torch keeps it."""
        # Rounding can leave constant data a hair below zero.
        return self.squares.clamp_min(0) / max(self.count - 1, 1)


def _count(values: Tensor) -> int:
    return values.numel() // values.shape[1]


def _pieces(values: Tensor) -> Iterator[Tensor]:
    size = _PIECE_ON_CPU if values.device.type == "cpu" else _PIECE
    if values.numel() <= size:
        return iter((values,))
    return iter(values.split(max(1, size * len(values) // values.numel())))


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations of each channel, in float64.

    Args:
      values: [batch, channels, ...].

    >>> moments(torch.tensor([[1.0], [2.0], [6.0]]))
    (tensor([3.], dtype=torch.float64), tensor([14.], dtype=torch.float64))
    """
    # mps has no float64.
    wide = values.float() if values.device.type == "mps" else values.double()
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance, mean = torch.var_mean(wide, axes, correction=0)
    return mean, variance * _count(values)


def _flat(values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The values as [values, channels] or [batch, channels, values], and the axes to sum over.

    Both are views where the memory format allows; the first is that of channels_last.
    """
    if values.dim() == 2:
        return values, (0,)
    last = values.movedim(1, -1)
    if last.is_contiguous():
        return last.reshape(-1, last.shape[-1]), (0,)
    return values.flatten(2), (0, 2)
