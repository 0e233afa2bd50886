"""How far the average of a long training is from the peer's own rule in float64."""

from __future__ import annotations

from collections.abc import Callable

from correctness.cells import Cell
from correctness.peer import Outcome, Peer, Tree
from correctness.scripts import Script, random_walk
from correctness.verdicts import accuracy

RULE_ASKS = (
    "How the peer weighs snapshots in this row: a mean where it can, else an exponential moving "
    "average (EMA) of decay .9999. Each is measured against the rule that it documents."
)
ASKS = (
    "Relative error of the average after a random walk of {dtype} weights, every update a snapshot "
    "(how many stands above the table), against the rule in float64 on the same weights. Right: "
    "below 1e-5."
)
KEPT_ASKS = "The dtype of the average of bfloat16 weights. Right: float32 or wider."


def of_dtype(dtype: str) -> Callable[[Peer, int], Cell]:
    """The question for weights of a dtype."""

    def ask(peer: Peer, snapshots: int) -> Cell:
        script = random_walk(snapshots, dtype)
        outcome = peer.train(script)
        return accuracy(outcome.average, reference(peer, script, outcome))

    return ask


def kept_in(peer: Peer, snapshots: int) -> Cell:
    dtype = peer.train(random_walk(3, "bfloat16")).dtype
    return Cell(dtype, right=dtype in ("float32", "float64"))


def reference(peer: Peer, script: Script, outcome: Outcome | None = None) -> Tree:
    """The average by the peer's rule in float64, of the weights that its training visited."""
    visited = (outcome and outcome.trajectory) or {"kernel": script.kernel, "bias": script.bias}
    return {name: peer.rule.average(each[0], each[1:]) for name, each in visited.items()}
