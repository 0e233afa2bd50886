"""One snapshot is NaN."""

from __future__ import annotations

import numpy as np

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import with_nan
from correctness.verdicts import nonfinite

ASKS = (
    "The 10th of 30 snapshots is NaN, and the training recovers. Right: the average is that of the "
    "other 29."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    script = with_nan(30, at=10)
    outcome = peer.train(script)
    visited = outcome.trajectory or {"kernel": script.kernel, "bias": script.bias}
    without = {
        name: peer.rule.average(each[0], np.delete(np.asarray(each[1:]), 9, axis=0))
        for name, each in visited.items()
    }
    return nonfinite(outcome.average, without)
