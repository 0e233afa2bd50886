"""What an average should be: the recurrence a peer documents, in float64.

A rule is its mixing weights ``a(n)`` for snapshots 1, 2, ... in ``avg <- avg + a(n) (w - avg)``;
one whose ``a(1)`` is below 1 begins at the initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from correctness.scripts import Array

DECAY = 0.9999


@dataclass(frozen=True)
class Rule:
    """A way of weighing snapshots.

    Attributes:
      name: as the tables show it.
      mix: the mixing weight of snapshot n, the first being 1.
    """

    name: str
    mix: Callable[[int], float]

    def average(self, initial: Array, snapshots: Iterable[Array]) -> Array:
        """The average of snapshots, in float64."""
        average = np.asarray(initial, np.float64)
        for n, snapshot in enumerate(snapshots, 1):
            share = self.mix(n)
            average = snapshot.copy() if share == 1.0 else average + share * (snapshot - average)
        return average

    def average_updated_twice(self, initial: Array, snapshots: Iterable[Array]) -> Array:
        """What comes out if each snapshot is mixed in twice by the weight of one."""
        average = np.asarray(initial, np.float64)
        for n, snapshot in enumerate(snapshots, 1):
            for _ in range(2):
                average = average + self.mix(n) * (snapshot - average)
        return average


UNIFORM = Rule("mean", lambda n: 1.0 / n)
EMA_FROM_INITIAL = Rule("EMA from initial weights", lambda n: 1.0 - DECAY)
EMA_FROM_FIRST = Rule("EMA from first snapshot", lambda n: 1.0 if n == 1 else 1.0 - DECAY)
EMA_DEBIASED = Rule("EMA, debiased", lambda n: (1.0 - DECAY) / (1.0 - DECAY**n))
# torch-ema and TensorFlow: the decay starts low and rises with the number of updates.
EMA_WARMED_UP = Rule("EMA, warm-up", lambda n: 1.0 - min(DECAY, (1 + n) / (10 + n)))
# ema-pytorch: the first call copies, the others take its inverse power.
EMA_POWER = Rule("EMA, power 2/3", lambda n: 1.0 if n == 1 else max(1.0 - DECAY, n ** (-2 / 3)))
