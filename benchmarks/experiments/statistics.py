"""Differences between methods that were run with the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# As many sign patterns are listed; with more seeds scipy draws this many at random.
PATTERNS = 2**16


class Paired(NamedTuple):
    """The mean of paired differences, and how sure it is.

    Attributes:
      mean: of the differences.
      low, high: its confidence interval by Student's t, 95 %.
      p: of the sign-flip test, two-sided: how often the mean is as far from 0 when each difference
        has its sign by chance. Exact up to 16 pairs; with n pairs it cannot be less than 2 / 2^n.
      n: pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares a with b, seed by seed: ``a - b``.

    Args:
      a, b: one value per seed, in the same order [>= 2].

    >>> result = paired([3.0, 4.0, 6.0], [2.0, 2.0, 3.0])
    >>> result.mean, round(result.low, 2), round(result.high, 2), result.p
    (2.0, -0.48, 4.48, 0.25)
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"pairs are needed, two at least; got {len(a)} and {len(b)} values")
    differences = np.subtract(a, b, dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    if not differences.any():
        return Paired(0.0, 0.0, 0.0, 1.0, count)
    half = stats.t.ppf(0.975, count - 1) * stats.sem(differences)
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=PATTERNS, rng=0
    )
    return Paired(mean, mean - float(half), mean + float(half), float(test.pvalue), count)
