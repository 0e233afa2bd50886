"""What the averages must be, in float64, without a second copy of any weights.

Weights are doubled and halved between updates, which is exact in every dtype. So each average is
the weights as they stand times one number, which float64 gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from reference import FACTORS, expected_scale
from torch import Tensor


class MovingWeights:
    """Weights that change by known factors.

    >>> weights = MovingWeights([torch.tensor([3.0])])
    >>> for _ in range(2):
    ...     weights.move()
    >>> weights.tensors[0].item(), weights.scales
    (3.0, [1.0, 2.0, 1.0])
    >>> weights.error([torch.tensor([4.5])], lambda update: 1 / update)
    0.0
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.scales = [1.0]
        self._factors = itertools.cycle(FACTORS)

    def move(self) -> None:
        """The next weights."""
        factor = next(self._factors)
        torch._foreach_mul_(self.tensors, factor)
        self.scales.append(self.scales[-1] * factor)

    def error(
        self,
        averages: Iterable[Tensor],
        mix: Callable[[int], float],
        updates: Sequence[int] | None = None,
    ) -> float:
        """How far averages are from the float64 ones: the largest relative error of a tensor.

        Args:
          averages: in the order of the weights.
          mix: how much an update weighs, by its number; the first is 1.
          updates: the moves after which there was an update; all if not given.
        """
        expected = expected_scale(self.scales, mix, updates)
        worst = 0.0
        for average, weight in zip(averages, self.tensors, strict=True):
            right = weight.double() * (expected / self.scales[-1])
            wrong = average.detach().double().sub_(right).norm() / right.norm()
            worst = max(worst, wrong.item())
        return worst
