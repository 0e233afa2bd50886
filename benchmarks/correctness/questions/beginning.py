"""Reading the average before there is one."""

from __future__ import annotations

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import Intent, random_walk
from correctness.verdicts import beginning

ASKS = (
    "What is evaluated as the average after 5 updates where it starts at 10. Right: the live "
    "weights, not those of initialisation, which nobody trained."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    script = random_walk(5)
    outcome = peer.train(script, Intent(start=10, every=4))
    return beginning(outcome.average, script.at(0), outcome.live)
