"""What a framework has to offer for the experiments to run in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from experiments.arms import Arm
from experiments.images import Batch, Images


class Training(Protocol):
    """A network in training, and the averages of the arm that it is in.

    It is made as ``Training(images, seed)``: the network of ``images.experiment`` with the
    initial weights of the seed, and SGD as the experiment says it.
    """

    def __init__(self, images: Images, seed: int): ...

    def begin(self, arm: Arm) -> None:
        """Begins an arm, from the weights and the momentum that are there: averages are empty."""

    def epoch(self, batches: Iterable[Batch], epoch: int) -> None:
        """Trains on batches at the arm's rate of an epoch."""

    def snapshots(self, average: str) -> list[int]:
        """The updates that joined an average, counted from the beginning of the arm."""

    def logits(self, average: str | None, *, bn: bool, images: int | None = None) -> np.ndarray:
        """Predictions for the (first) test images; training is not disturbed.

        Args:
          average: by which average of the arm; None, by the running weights.
          bn: whether batch-norm statistics are recomputed, on ``Images.for_bn``; if not, they are
            those of the running weights.

        Returns:
          [images, classes].
        """

    def average(self, average: str) -> list[np.ndarray]:
        """The averaged weights, in the order and the layout of ``networks.weights``."""

    def state(self, *, averages: bool) -> dict[str, Any]:
        """Something that can be pickled: weights, statistics, momentum and, if asked, averages."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state; one with averages is restored after ``begin`` of the same arm."""
