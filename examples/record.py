"""What a training run reports, the same in every framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """Test accuracy [%] and mean negative log-likelihood [nats]."""

    accuracy: float
    nll: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Scores logits [n, classes] against labels [n].

    >>> round(score(np.log([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1])).nll, 4)
    0.4904
    """
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nll = -log_p[np.arange(len(labels)), labels].mean()
    return Score(100 * float((logits.argmax(axis=1) == labels).mean()), float(nll))


# Where on the line from the last weights (0) to the average (1) the loss is taken.
LINE = [round(t, 2) for t in np.linspace(-0.5, 1.5, 21)]


@dataclass
class Record:
    """One training run.

    Attributes:
      snapshots: the updates whose weights joined the average.
      scores: by "last", "average" (with the last weights' batch-norm statistics) and
        "average + update_bn" (with its own).
      last: test loss of the running weights after each epoch.
      average: likewise of the average, None before the first snapshot.
      line: test loss at the points of ``LINE``, batch-norm statistics recomputed at each.
    """

    snapshots: list[int] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    last: list[float] = field(default_factory=list)
    average: list[float | None] = field(default_factory=list)
    line: list[float] = field(default_factory=list)
