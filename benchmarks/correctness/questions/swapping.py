"""The average is put into the model for an evaluation and taken out again."""

from __future__ import annotations

from collections.abc import Callable

from correctness.cells import Cell
from correctness.peer import Peer
from correctness.scripts import random_walk
from correctness.verdicts import back, same

ASKS = (
    "The weights of the model after an evaluation on the average, as the documentation has it. "
    "Right: those of before, bit for bit."
)
RAISING_ASKS = (
    "The same where something is raised during the evaluation, and caught by the user outside of "
    "it."
)


def after(*, raising: bool) -> Callable[[Peer, int], Cell]:
    """The question, with a raise inside or without."""

    def ask(peer: Peer, snapshots: int) -> Cell:
        swap = peer.swapped(random_walk(20), raising=raising)
        if same(swap.during, swap.before):
            return Cell("never swapped in", right=False)
        return back(swap.before, swap.after, swap.during)

    return ask
