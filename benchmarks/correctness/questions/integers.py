"""What an integer buffer holds in the model that is evaluated."""

from __future__ import annotations

import numpy as np

from correctness.cells import Cell, NotApplicableError
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import integers

ASKS = (
    "An integer buffer of the model (a count of what was seen) grows by 100 with each update; what "
    "the averaged model holds. Right: the model's own value, not a mean of integers."
)
COUNTS = tuple(range(0, 4000, 100))


def ask(peer: Peer, snapshots: int) -> Cell:
    outcome = peer.train(random_walk(len(COUNTS) - 1, counts=COUNTS))
    if outcome.count is None:
        raise NotApplicableError("knows of weights alone")
    averaged = peer.rule.average(np.float64(COUNTS[0]), np.float64(COUNTS[1:]))
    return integers(outcome.count, COUNTS, float(averaged))
