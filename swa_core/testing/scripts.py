"""Scripted weights: what the kit makes a training visit.

Frameworks round differently: a fused multiply-add, ``a + t (b - a)`` or ``b - (1 - t)(b - a)``.
So the scripts that are compared bit for bit consist of whole numbers whose running average is a
whole number too, and whose correction ``w - average`` is at every snapshot no larger than the new
average: then every one of these forms rounds to the same float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from swa_core.rules import EMA, Polynomial, Rule, Uniform
from swa_core.schedule import Schedule
from swa_core.testing.driver import Weights

SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": ()}

# Their mixing weights are fractions of small whole numbers, which the scripts need.
EXACT_RULES: tuple[Rule, ...] = (Uniform(), EMA(0.5), Polynomial(eta=1))


def whole(seed: int, dtype: str = "float32") -> Weights:
    """Weights of whole numbers between 100 and 150, exact also in bfloat16.

    >>> sorted(whole(0)) == sorted(SHAPES)
    True
    """
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.integers(100, 151, shape)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def mixing_weights(rule: Rule) -> Iterator[Fraction]:
    """The mixing weights of a rule out of ``EXACT_RULES``, exactly.

    >>> weights = mixing_weights(Uniform())
    >>> [str(next(weights)) for _ in range(3)]
    ['1', '1/2', '1/3']
    """
    total, n = Fraction(1), 1
    while True:
        yield 1 / total
        retain = Fraction(rule.retain(float(n))).limit_denominator(1000)
        total, n = retain * total + 1, n + 1


def exact(rule: Rule, schedule: Schedule, updates: int, seed: int = 0) -> list[Weights]:
    """Weights for ``updates`` updates whose running average is a whole number throughout.

    Args:
      rule: one of ``EXACT_RULES``.
      schedule: which of the updates are snapshots (6 at the most for ``EMA(0.5)``).
      updates: how many updates.
      seed: of the random numbers.

    >>> script = exact(Uniform(), Schedule(2, 2), 6)
    >>> mean = np.mean([script[t - 1]["kernel"] for t in (2, 4, 6)], axis=0)
    >>> bool((mean == np.round(mean)).all())
    True
    """
    rng = np.random.default_rng(seed)
    shares = mixing_weights(rule)
    average: dict[str, np.ndarray] = {}
    script = []
    for update in range(1, updates + 1):
        weights = whole(seed + update)
        if schedule.is_snapshot(update):
            share = next(shares)
            for name, new in weights.items():
                if name in average:
                    sign = rng.integers(-1, 2, new.shape)
                    weights[name] = (average[name] + sign * share.denominator).astype(np.float32)
                    average[name] = average[name] + sign * share.numerator
                    if (share.denominator > average[name]).any():
                        raise ValueError(f"{rule} at {update}: the script is too long to be exact")
                else:
                    average[name] = new
        script.append(weights)
    return script


def noisy(updates: int, seed: int = 0) -> Iterator[Weights]:
    """Weights as a training visits them: noise about a point that drifts, none of them near 0.

    The drift is what makes a wrong mixing weight show: noise alone averages out with any weights.
    """
    rng = np.random.default_rng(seed)
    drift = {name: rng.uniform(5, 10, shape) for name, shape in SHAPES.items()}
    for update in range(updates):
        yield {
            name: (1 + (update / updates) * drift[name] + 0.1 * rng.standard_normal(shape)).astype(
                np.float32
            )
            for name, shape in SHAPES.items()
        }
