"""The learning rate from the start of the averaging on: constant, annealed or cyclical."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Shape = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """What the user writes in ``[swa.lr]``.

    Either ``value`` with an optional ``anneal`` and ``shape``, or ``value``, ``cycle`` and
    ``low``.

    Attributes:
      value: the rate to reach and keep; with ``cycle``, the rate at the top of each cycle [> 0].
      anneal: how long it takes from the rate at the start to ``value``, counted from the start.
        None changes at once.
      shape: the way there, "cosine" or "linear".
      cycle: the length of one cycle; snapshots should fall on its end, so ``every`` must be a
        multiple of it.
      low: the rate at the end of each cycle [0 < low <= value].
    """

    value: float
    anneal: str | None = None
    shape: Shape = "cosine"
    cycle: str | None = None
    low: float | None = None

    def __post_init__(self) -> None:
        # A numpy scalar would bring its dtype into the arithmetic, and cannot go into a file.
        for name in ("value", "low"):
            if isinstance(rate := getattr(self, name), np.generic):
                object.__setattr__(self, name, rate.item())


class LRSchedule(NamedTuple):
    """A ``LearningRate`` in updates, as ``SWAConfig.lr_schedule`` resolves it.

    Attributes:
      start: the last update made at the base rate [updates].
      value: the rate to reach, or the top of each cycle.
      anneal: length of the way from the base rate to ``value`` [updates, >= 0].
      shape: the way there.
      cycle: length of one cycle [updates], or None.
      low: the rate at the end of each cycle, or None.
    """

    start: int
    value: float
    anneal: int = 0
    shape: Shape = "cosine"
    cycle: int | None = None
    low: float | None = None


def learning_rate(update: Any, base: Any, lr: LRSchedule, *, xp: Any = np) -> Any:
    """The rate that makes update ``update`` (the first update is 1).

    Up to and including ``lr.start`` it is ``base``. After it, with t running from 0 to 1 over
    ``anneal``, linear: ``(1 - t) base + t value``; cosine: ``t`` replaced by
    ``(1 - cos(pi t)) / 2``; cyclical: ``(1 - t) value + t low`` with
    ``t = ((i - 1) mod cycle + 1) / cycle`` at the i-th update after the start, so that update
    ``start + k cycle`` is made at ``low``.

    Args:
      update: the update to be made [updates, >= 1]; int, integer array or traced int32.
      base: the rate of the group at the start; a float or an array of a floating dtype.
      lr: the resolved configuration.
      xp: the array namespace that computes: numpy, or jax.numpy for traced values.

    Returns:
      The rate, a scalar of ``xp`` or an array of the shape of ``update``.

    Source:
      The cyclical rate: Izmailov et al. 2018, arXiv:1803.05407, sec. 3.1.

    >>> lr = LRSchedule(start=10, value=0.05, anneal=4, shape="linear")
    >>> [round(float(learning_rate(u, 0.1, lr)), 4) for u in (10, 11, 12, 14, 99)]
    [0.1, 0.0875, 0.075, 0.05, 0.05]
    >>> lr = LRSchedule(start=10, value=0.05, cycle=2, low=0.01)
    >>> [round(float(learning_rate(u, 0.1, lr)), 4) for u in (10, 11, 12, 13, 14)]
    [0.1, 0.03, 0.01, 0.03, 0.01]
    """
    # What lies before the start or after the end is computed too, so that a compiler can trace it,
    # and replaced. So are the ends: base + (value - base) need not be value, and 7 / 7 need not be
    # 1 where it is compiled to a multiplication by 1 / 7.
    since = update - lr.start
    if lr.cycle is not None:
        low: Any = lr.low
        place = (since - 1) % lr.cycle + 1
        rate = lr.value + (place / lr.cycle) * (low - lr.value)
        rate = xp.where(place >= lr.cycle, low, rate)
    elif lr.anneal:
        t = since / lr.anneal
        if lr.shape == "cosine":
            t = (1.0 - xp.cos(np.pi * t)) / 2.0
        rate = xp.where(since >= lr.anneal, lr.value, base + t * (lr.value - base))
    else:
        rate = lr.value
    return xp.where(since > 0, rate, base)
