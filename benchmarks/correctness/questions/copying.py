"""Copies of everything in the middle of a training."""

from __future__ import annotations

from correctness.cells import Cell, NotApplicableError
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import copied

ASKS = (
    "Model, optimizer and averager are copied together in the middle, by copy.deepcopy and by "
    "pickle, and the copy goes on. Right: both end on the average of the original."
)
UPDATES, CUT = 12, 6


def ask(peer: Peer, snapshots: int) -> Cell:
    script = random_walk(UPDATES)
    outcomes = {}
    for way in ("deepcopy", "pickle"):
        try:
            outcomes[way] = peer.copied(script, CUT, way).average
        except NotApplicableError:
            raise
        except Exception as error:
            outcomes[way] = error
    return copied(outcomes, peer.train(script).average)
