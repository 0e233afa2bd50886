"""How good predictions are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Guo et al. 2017, arXiv:1706.04599.
BINS = 15


class Score(NamedTuple):
    """Accuracy [%], mean negative log-likelihood [nats], expected calibration error [%]."""

    accuracy: float
    nll: float
    ece: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Scores logits [n, classes] against labels [n].

    >>> both = score(np.log([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1]))
    >>> both.accuracy, round(both.nll, 4), round(both.ece, 2)
    (50.0, 0.4904, 37.5)
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nll = -log_p[np.arange(len(labels)), labels].mean()
    right = logits.argmax(axis=1) == labels
    return Score(100 * float(right.mean()), float(nll), 100 * _ece(np.exp(log_p).max(1), right))


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """|accuracy - confidence| in bins of equal width, weighted by how many are in each."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(right))
