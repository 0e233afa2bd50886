"""The model that is trained is wrapped, and its names have a prefix."""

from __future__ import annotations

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.questions.accuracy import reference
from correctness.scripts import random_walk
from correctness.verdicts import moved

ASKS = (
    "Whoever takes the model for its updates is handed torch.compile of it, whose names begin with "
    "_orig_mod; a second model for the average, where the user makes one, is plain. Right: the "
    "weights are averaged all the same."
)


def ask(peer: Peer, snapshots: int) -> Cell:
    script = random_walk(30)
    outcome = peer.renamed(script)
    return moved(outcome.average, reference(peer, script, outcome), script.at(0))
