"""Comparisons of weights that say which leaf differs, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class ConformanceError(AssertionError):
    """An adapter does not do what every adapter must."""


def require(condition: bool, message: str) -> None:
    """Raises ``ConformanceError`` unless the condition holds (an ``assert`` that -O keeps)."""
    if not condition:
        raise ConformanceError(message)


def same_names(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Requires the same leaves on both sides."""
    require(isinstance(actual, Mapping), f"{what}: the driver gave {actual!r}, expected a dict")
    require(
        actual.keys() == expected.keys(),
        f"{what}: holds the leaves {sorted(actual)}, expected {sorted(expected)}",
    )


def same_bits(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Requires the same leaves, dtypes, shapes and bits (so -0.0 is not 0.0, and NaN is NaN).

    >>> same_bits({"w": np.float32([0.0])}, {"w": np.float32([-0.0])}, "the average")
    Traceback (most recent call last):
    swa_core.testing.comparing.ConformanceError: the average: leaf 'w' is [0.], expected [-0.]
    """
    same_names(actual, expected, what)
    for name, value in expected.items():
        got, value = np.asarray(actual[name]), np.asarray(value)
        for fact in ("dtype", "shape"):
            require(
                getattr(got, fact) == getattr(value, fact),
                f"{what}: leaf '{name}' has {fact} {getattr(got, fact)}, "
                f"expected {getattr(value, fact)}",
            )
        require(
            got.tobytes() == value.tobytes(), f"{what}: leaf '{name}' is {got}, expected {value}"
        )


def close(
    actual: Mapping[str, Any], expected: Mapping[str, Any], relative: float, what: str
) -> None:
    """Requires the difference, over all leaves, to be small beside what is expected.

    Args:
      actual: the weights to judge.
      expected: what they should be, float64.
      relative: the largest ratio of the two Euclidean norms that is allowed.
      what: what ``actual`` is, the beginning of the message.

    >>> close({"w": np.float32([1.1])}, {"w": np.array([1.0])}, 1e-3, "the average")
    Traceback (most recent call last):
    swa_core.testing.comparing.ConformanceError: the average is off by 1.0e-01, allowed are 1e-03
    """
    same_names(actual, expected, what)
    off = size = 0.0
    for name, value in expected.items():
        got = np.asarray(actual[name], np.float64)
        require(
            got.shape == np.shape(value),
            f"{what}: leaf '{name}' has shape {got.shape}, expected {np.shape(value)}",
        )
        off += float(np.sum(np.square(got - value)))
        size += float(np.sum(np.square(value)))
    error = float(np.sqrt(off / size))
    # Written so that a NaN is no success.
    require(error <= relative, f"{what} is off by {error:.1e}, allowed are {relative:.0e}")
