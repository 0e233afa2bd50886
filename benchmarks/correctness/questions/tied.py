"""Weights that have two names in the model."""

from __future__ import annotations

from correctness.cells import Cell, NotApplicableError
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import tied

ASKS = (
    "The kernel has two names in the model. Right: it is averaged once (twice means that each "
    "snapshot counts double), and is one array under both names in the averaged model."
)
UPDATES = 200


def ask(peer: Peer, snapshots: int) -> Cell:
    script = random_walk(UPDATES, tied=True)
    outcome = peer.train(script)
    found = {name: value for name, value in outcome.average.items() if name in ("kernel", "tied")}
    if len(found) < 2 and outcome.tied is None:
        raise NotApplicableError("no second names")
    visited = (outcome.trajectory or {"kernel": script.kernel})["kernel"]
    once = peer.rule.average(visited[0], visited[1:])
    twice = peer.rule.average_updated_twice(visited[0], visited[1:])
    return tied(found, once, twice, still_tied=outcome.tied)
