"""Batch-norm statistics of the averaged weights."""

from __future__ import annotations

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import BATCH_SIZES, batches, pooled_statistics, random_walk
from correctness.verdicts import statistics

ASKS = (
    "The statistics that the averaged model has after the peer's own recomputation on batches of "
    f"{BATCH_SIZES[0]}, {BATCH_SIZES[1]} and {BATCH_SIZES[2]}, whose means differ, against those "
    "of the pooled data under the same weights in float64; the larger of the error of a mean in "
    "standard deviations and the relative error of a variance. Right: below 1e-5."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    script = random_walk(30, batch_norm=True)
    inputs = batches(script)
    seen = peer.batch_norm(script, inputs)
    mean, var = pooled_statistics(seen.weights, inputs)
    if not seen.biased:
        var = var * sum(BATCH_SIZES) / (sum(BATCH_SIZES) - 1)
    return statistics(seen.found, mean, var, seen.how, seen.training)
