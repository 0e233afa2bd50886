"""Which updates are snapshots for one and the same wish."""

from __future__ import annotations

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import Intent, one_hot
from correctness.verdicts import counted

UPDATES = 20
INTENT = Intent(start=10, every=4)
ASKS = (
    "The user wants snapshots from update 10 on, every 4, in 20 updates, and hands these numbers "
    "to the peer's own parameters (or its documented loop). Shown are the updates found in the "
    "average, each of which has weights of its own; 0 are the initial weights. Right: "
    f"{', '.join(map(str, INTENT.snapshots(UPDATES)))}, as in the code of the paper's authors."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    outcome = peer.train(one_hot(UPDATES), INTENT)
    return counted(outcome.average["kernel"][:, 0], INTENT.snapshots(UPDATES))
