"""Numbers as people give them, and as plain floats."""

from __future__ import annotations

import math

import numpy as np


def number(value: object) -> float | None:
    """A number, Python's or a numpy scalar, as a float; None for everything else, bools too.

    >>> number(3), number(np.float32(0.5)), number(True), number("3")
    (3.0, 0.5, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
