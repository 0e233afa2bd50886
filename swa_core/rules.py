"""HOW MUCH: the weight of each snapshot in the average, on one recurrence.

Every rule gives snapshot n the mixing weight ``1 / total_n`` in
``average <- average + (weights - average) / total_n``, where ``total_1 = 1`` and
``total_{n+1} = retain(n) * total_n + 1``. The first mixing weight is exactly 1: a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swa_core.numeric import number


@dataclass(frozen=True)
class Uniform:
    """The plain mean of all snapshots: Polyak-Ruppert averaging, and SWA.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, eq. (1).

    >>> Uniform().mixing_weight(4)
    0.25
    """

    def retain(self, n: Any) -> Any:
        """The share of ``total`` kept when snapshot n + 1 joins the n before it: all of it.

        Args:
          n: snapshots averaged so far [>= 1]; a float of any kind, so that the result does not
            change its dtype.
        """
        return 1.0

    def mixing_weight(self, n: Any, *, expm1: Callable[[Any], Any] = math.expm1) -> Any:
        """The weight of snapshot n as it joins: 1 / n.

        Args:
          n: the number of this snapshot [>= 1], a float of any kind.
          expm1: the framework's own, where n is its own kind of number (unused here).
        """
        return 1.0 / n

    def effective_snapshots(self, n: int) -> float:
        """How many equally weighted snapshots would average away as much noise: n.

        Args:
          n: snapshots in the average [>= 0].
        """
        return float(n)

    def mean_age(self, n: int) -> float:
        """The mean age of what is in the average [snapshots; the newest has age 0].

        Args:
          n: snapshots in the average [>= 0]; the age of nothing is NaN.

        >>> Uniform().mean_age(11)
        5.0
        """
        return (n - 1) / 2 if n else math.nan


@dataclass(frozen=True)
class EMA:
    """Exponential moving average, debiased: snapshot n - k weighs ``decay ** k``, normalised.

    Debiased, the first snapshot is copied and early averages are means of what was seen, so no
    warm-up of the decay is needed.

    Args:
      decay: what the weight of a snapshot shrinks by at each following one [0 < decay < 1].
        Counted in snapshots: averaging every k updates takes ``decay ** k``.
      half_life: the same said in time: after so many snapshots a weight has halved [> 0].
        Exactly one of the two is given.

    Raises:
      ValueError: both or neither, no number, or out of range.

    Source:
      Kingma & Ba 2015, arXiv:1412.6980, sec. 3 (the debiasing).

    >>> EMA(half_life=1).retain(1.0)
    0.5
    >>> EMA(0.5).mixing_weight(2)
    0.6666666666666666
    """

    decay: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.half_life is None):
            raise ValueError("say either decay or half_life, and not both")
        if self.decay is not None and not 0 < _set_float(self, "decay") < 1:
            raise ValueError(
                f"decay must lie between 0 and 1, got {self.decay!r} "
                '(1 would be the rule "uniform")'
            )
        if self.half_life is not None and not 0 < _set_float(self, "half_life") < math.inf:
            raise ValueError(
                f"half_life must be a positive number of snapshots, got {self.half_life!r}"
            )

    @property
    def log_decay(self) -> float:
        """The logarithm of the decay, exact also where the decay rounds to 1."""
        if self.half_life is not None:
            h = math.log(2) / self.half_life
        else:
            assert self.decay is not None
            h = -math.log(self.decay)
        # Beyond these bounds nothing changes any more, but float32 would under- or overflow.
        return -min(max(h, 1e-30), 700.0)

    def retain(self, n: Any) -> Any:
        """The share of ``total`` kept when another snapshot joins: the decay."""
        return self.decay if self.decay is not None else math.exp(self.log_decay)

    def mixing_weight(self, n: Any, *, expm1: Callable[[Any], Any] = math.expm1) -> Any:
        """The weight of snapshot n as it joins: ``(1 - decay) / (1 - decay ** n)``.

        The recurrence drifts in float32 (1e-5 after 10 000 snapshots at .9999); this form, with
        the logarithm taken on the host, does not.

        Args:
          n: the number of this snapshot [>= 1], a float of any kind.
          expm1: the framework's own, where n is its own kind of number.
        """
        # Both arguments pass through the same multiplication, so that n = 1 divides equals.
        return expm1(self.log_decay * (n / n)) / expm1(self.log_decay * n)

    def effective_snapshots(self, n: int) -> float:
        """How many equally weighted snapshots would average away as much noise.

        Args:
          n: snapshots in the average [>= 0].

        >>> round(EMA(0.999).effective_snapshots(100_000))
        1999
        """
        # (sum p)^2 / sum p^2 with p_k = decay^k, two geometric sums:
        # (1 + b) / (1 - b) * (1 - b^n) / (1 + b^n).
        h = -self.log_decay
        return math.tanh(n * h / 2) / math.tanh(h / 2)

    def mean_age(self, n: int) -> float:
        """The mean age of what is in the average [snapshots; the newest has age 0].

        Args:
          n: snapshots in the average [>= 0]; the age of nothing is NaN.

        >>> round(EMA(0.999).mean_age(100_000))
        999
        """
        if not n:
            return math.nan
        h = -self.log_decay
        if n * h < 0.1:
            # The series of the difference below, whose two terms nearly cancel here.
            return (n - 1) / 2 - (n**2 - 1) * h / 12 + (n**4 - 1) * h**3 / 720
        # b / (1 - b) - n b^n / (1 - b^n); the last term vanishes before exp overflows.
        return 1 / math.expm1(h) - (n / math.expm1(n * h) if n * h <= 700 else 0.0)


@dataclass(frozen=True)
class Polynomial:
    """Polynomial-decay averaging: the window grows with the training, and forgets the beginning.

    Snapshot n joins with weight ``(eta + 1) / (n + eta)``; ``eta = 0`` is uniform, larger ones
    look at the recent past only (mean age about ``n / (eta + 2)``).

    Args:
      eta: how fast the beginning is forgotten [>= 0].

    Raises:
      ValueError: no number, or out of range.

    Source:
      Shamir & Zhang 2013, arXiv:1212.1824, sec. 4.

    >>> Polynomial(eta=3).mixing_weight(2)
    0.8
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= _set_float(self, "eta") < math.inf:
            raise ValueError(f"eta must be a finite number >= 0, got {self.eta!r}")

    @property
    def _eta(self) -> float:
        # Beyond it nothing changes any more, but float32 would overflow.
        return min(self.eta, 1e30)

    def retain(self, n: Any) -> Any:
        """The share of ``total`` kept when snapshot n + 1 joins: ``n / (n + eta)``."""
        return n / (n + self._eta)

    def mixing_weight(self, n: Any, *, expm1: Callable[[Any], Any] = math.expm1) -> Any:
        """The weight of snapshot n as it joins: ``(eta + 1) / (n + eta)``.

        Args:
          n: the number of this snapshot [>= 1], a float of any kind.
          expm1: the framework's own, where n is its own kind of number (unused here).
        """
        # Both sums are of the kind of n, so that n = 1 divides equals.
        return (n / n + self._eta) / (n + self._eta)

    def effective_snapshots(self, n: int) -> float:
        """How many equally weighted snapshots would average away as much noise.

        Args:
          n: snapshots in the average [>= 0]; the time it takes grows with n.

        >>> Polynomial(eta=0).effective_snapshots(10)
        10.0
        """
        total = squares = 1.0
        for k in range(1, n):
            retain = self.retain(k)
            total, squares = total * retain + 1, squares * retain * retain + 1
        return total * total / squares if n else 0.0

    def mean_age(self, n: int) -> float:
        """The mean age of what is in the average [snapshots; the newest has age 0].

        Args:
          n: snapshots in the average [>= 0]; the age of nothing is NaN.

        >>> Polynomial(eta=0).mean_age(11)
        5.0
        """
        # One more snapshot makes all others one older and itself has age 0, so with a = mixing
        # weight, age_n = (1 - a)(age_{n-1} + 1); its solution is linear in n.
        return (n - 1) / (self.eta + 2) if n else math.nan


Rule = Uniform | EMA | Polynomial

BY_NAME: dict[str, type[Uniform] | type[EMA] | type[Polynomial]] = {
    "uniform": Uniform,
    "ema": EMA,
    "polynomial": Polynomial,
}


def name_of(rule: Rule) -> str:
    """What a rule is called in a configuration.

    Raises:
      TypeError: it is none of the rules above.

    >>> name_of(EMA(0.99))
    'ema'
    """
    for name, kind in BY_NAME.items():
        if type(rule) is kind:
            return name
    raise TypeError(f"expected Uniform(), EMA(...) or Polynomial(...), got {rule!r}")


def _set_float(rule: EMA | Polynomial, name: str) -> float:
    # A plain float whatever was given: a numpy scalar would bring its dtype into the arithmetic,
    # and could not be written to a file.
    value = number(getattr(rule, name))
    if value is None:
        raise ValueError(f"{name} must be a number, got {getattr(rule, name)!r}")
    object.__setattr__(rule, name, value)
    return value
