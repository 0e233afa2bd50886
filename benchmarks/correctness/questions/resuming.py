"""A run that is saved and gone on with."""

from __future__ import annotations

from collections.abc import Callable

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import resumed

ASKS = (
    "Saved in the middle by the documented state of model, optimizer and averager, loaded into new "
    "ones, gone on with: the average at the end. Right: bit-equal to that of the run that was not "
    "interrupted."
)
HALF_ASKS = "The same with bfloat16 weights, whose average may have another dtype than they."
# Many, for stochastic rounding shows after a while; cut at an epoch of 10.
UPDATES = 1000


def of_dtype(dtype: str) -> Callable[[Peer, int], Cell]:
    """The question for weights of a dtype."""

    def ask(peer: Peer, snapshots: int) -> Cell:
        updates = min(UPDATES, snapshots // 10 * 10)
        script = random_walk(updates, dtype)
        return resumed(peer.resumed(script, updates * 6 // 10).average, peer.train(script).average)

    return ask
