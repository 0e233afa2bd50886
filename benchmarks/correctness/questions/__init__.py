"""A file for each question: what it asks, and ``ask``, which answers for a peer.

The order here is that of the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from correctness.cells import Cell, NotApplicableError, not_applicable, raised
from correctness.peer import Peer
from correctness.questions import (
    accuracy,
    batch_norm,
    beginning,
    copying,
    counting,
    integers,
    memory,
    names,
    nonfinite,
    resuming,
    swapping,
    tied,
)


@dataclass(frozen=True)
class Question:
    """What every peer is asked.

    Attributes:
      title: of its column.
      asks: what it means and what is right, for the legend.
      ask: the answer of a peer; the number is how many snapshots long trainings have.
      always: whether the quick command asks it of slow peers, too.
    """

    title: str
    asks: str
    ask: Callable[[Peer, int], Cell]
    always: bool = False


@dataclass(frozen=True)
class Part:
    """Questions whose answers stand side by side."""

    title: str
    questions: tuple[Question, ...]


PARTS = (
    Part(
        "The average itself",
        (
            Question("rule", accuracy.RULE_ASKS, lambda peer, _: Cell(peer.rule.name), always=True),
            *(
                Question(dtype, accuracy.ASKS.format(dtype=dtype), accuracy.of_dtype(dtype))
                for dtype in ("float32", "bfloat16", "float16")
            ),
            Question("bfloat16 is kept in", accuracy.KEPT_ASKS, accuracy.kept_in),
            Question("one NaN snapshot", nonfinite.ASKS, nonfinite.ask, always=True),
        ),
    ),
    Part(
        "What is in it",
        (
            Question("integer buffer", integers.ASKS, integers.ask),
            Question("tied weights", tied.ASKS, tied.ask, always=True),
            Question("batch norm, ragged batches", batch_norm.ASKS, batch_norm.ask),
            Question("compiled model", names.ASKS, names.ask),
        ),
    ),
    Part(
        "When",
        (
            Question("start 10, every 4", counting.ASKS, counting.ask, always=True),
            Question("before the first snapshot", beginning.ASKS, beginning.ask),
            Question("memory of the average", memory.ASKS, memory.ask),
        ),
    ),
    Part(
        "Going on",
        (
            Question("resume", resuming.ASKS, resuming.of_dtype("float32")),
            Question("resume, bfloat16", resuming.HALF_ASKS, resuming.of_dtype("bfloat16")),
            Question("deepcopy, pickle", copying.ASKS, copying.ask),
            Question("after a swap", swapping.ASKS, swapping.after(raising=False)),
            Question("after a raise in it", swapping.RAISING_ASKS, swapping.after(raising=True)),
        ),
    ),
)


def answer(question: Question, peer: Peer, snapshots: int) -> Cell:
    """The cell; whatever is raised is one, too."""
    try:
        return question.ask(peer, snapshots)
    except NotApplicableError as reason:
        return not_applicable(str(reason))
    except Exception as error:
        return raised(error)
