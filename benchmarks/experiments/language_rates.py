"""The learning rates of the arms, as shares of their peak."""

from __future__ import annotations

from collections.abc import Callable


def constant(update: int, *, warmup: int) -> float:
    """The share of the peak that makes this update (the first is 1): up in a line, then 1.

    >>> [constant(update, warmup=4) for update in (1, 2, 3, 4, 5, 100)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return min(1.0, update / max(1, warmup))


def decayed(update: int, *, warmup: int, first: int, last: int) -> float:
    """As ``constant``, but down in a line from update ``first`` on, to 0 after update ``last``.

    Update ``last`` is made at the last rate that is not 0, so that no update is for nothing.

    >>> [decayed(update, warmup=2, first=4, last=7) for update in range(1, 8)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    left = (last + 1 - update) / (last + 1 - first)
    return constant(update, warmup=warmup) * min(1.0, max(0.0, left))


def linear(updates: int, warmup: int) -> Callable[[int], float]:
    """Linear decay to zero over a whole training: what comes after the warm-up decays.

    >>> rate = linear(updates=6, warmup=2)
    >>> [rate(update) for update in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return lambda update: decayed(update, warmup=warmup, first=warmup + 1, last=updates)
