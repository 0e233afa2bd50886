"""What an average of weights must be that change by known factors.

Doubling and halving is exact in every dtype. So each average is the weights as they stand times
one number, which float64 gives, without a second copy of any weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

FACTORS = (2.0, 0.5, 0.5, 2.0)


def expected_scale(
    scales: Sequence[float], mix: Callable[[int], float], updates: Sequence[int] | None = None
) -> float:
    """The scale of the average.

    Args:
      scales: of the weights: at first, and after each move.
      mix: how much an update weighs, by its number; the first is 1.
      updates: the moves after which there was an update; all if not given.

    >>> expected_scale([1.0, 2.0, 1.0], lambda update: 1 / update)
    1.5
    """
    expected = scales[0]
    moves = range(1, len(scales)) if updates is None else updates
    for number, move in enumerate(moves, start=1):
        expected += mix(number) * (scales[move] - expected)
    return expected
