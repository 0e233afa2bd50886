"""Whether average and weights are the same memory."""

from __future__ import annotations

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import memory

ASKS = (
    "Whether the average lies in the memory of the weights (CPU), where changing or donating the "
    "one changes the other. Right: it has its own."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    return memory(peer.memory(random_walk(2)))
