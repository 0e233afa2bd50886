"""The loss along a line, and along random rays: positions, values, and numbers to quote."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np

from swa_core.plots.directions import Normalization
from swa_core.plots.measured import Floats, Measured, frozen_array, refuse_unordered
from swa_core.plots.saving import numbers


class Barrier(NamedTuple):
    """How far a loss rises between two sets of weights, above the chord from one to the other.

    Attributes:
      height: of the highest point above the chord, in the units of the measure; at least 0, which
        it is at the ends.
      position: where that is, from 0 to 1.
    """

    height: float
    position: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Line(Measured):
    """Measures along the line through two sets of weights.

    Attributes:
      positions: increasing, of shape (n,): 0 at the first set of weights, 1 at the second.
      measures: by name, values of shape (n,); NaN where there is none.
      length: the distance between the two in weight space.
      names: what the two are called.

    >>> line = Line(positions=[0, 0.5, 1], measures={"loss": [1, 4, 2]}, length=10)
    >>> line.barrier()
    Barrier(height=2.5, position=0.5)
    """

    kind: ClassVar[str] = "line"

    positions: Floats
    measures: Mapping[str, Floats]
    length: float
    names: tuple[str, str] = ("w1", "w2")

    def __post_init__(self) -> None:
        self._freeze(["positions"])
        object.__setattr__(self, "length", float(self.length))
        first, second = self.names
        if not isinstance(first, str) or not isinstance(second, str):
            raise TypeError(f"names are strings, got {self.names!r}")
        object.__setattr__(self, "names", (first, second))
        refuse_unordered(self.positions, "positions")

    def _shape(self) -> tuple[int, ...]:
        return (self.positions.size,)

    @classmethod
    def _read(cls, saved: dict[str, Any]) -> dict[str, Any]:
        return {
            "positions": numbers(saved["positions"]),
            "measures": {key: numbers(values) for key, values in saved["measures"].items()},
            "length": numbers(saved["length"]),
            "names": tuple(saved["names"]),
        }

    @property
    def distances(self) -> Floats:
        """The positions as distances from the first set in weight space; shape (n,)."""
        return frozen_array(self.positions * self.length)

    def barrier(self, measure: str | None = None) -> Barrier:
        """How far a measure rises above its linear interpolation between the two sets of weights.

        Args:
          measure: which; by default the first.

        Returns:
          NaN for the height where a value between the two is missing.

        Raises:
          ValueError: the line does not hold both of them (the positions 0 and 1).

        Source:
          Frankle et al. 2020, arXiv:1912.05671 (the error barrier); with the chord in place of the
          mean of the ends: Entezari et al. 2022, arXiv:2110.06296.
        """
        inside = (self.positions >= 0) & (self.positions <= 1)
        at, found = self.positions[inside], self.values(measure)[inside]
        if not at.size or at[0] != 0 or at[-1] != 1:
            raise ValueError("a barrier needs the values at the positions 0 and 1")
        if np.isnan(found).any():
            return Barrier(np.nan, np.nan)
        above = found - ((1 - at) * found[0] + at * found[-1])
        above[[0, -1]] = 0.0  # whatever rounding says
        highest = int(np.argmax(above))
        return Barrier(float(above[highest]), float(at[highest]))

    def draw(self, ax: Any = None, **options: Any) -> Any:
        """Draws with matplotlib; see ``swa_core.plots.drawing.draw_line``. Returns the axes."""
        from swa_core.plots.drawing import draw_line

        return draw_line(self, ax, **options)


class Rise(NamedTuple):
    """How far one can walk from weights before a measure has risen by a given amount.

    Attributes:
      radii: for each ray, of shape (n,); infinite where the measure has not risen so far within
        the rays, NaN where a value is missing before it has.
      mean: of the radii, NaN if not all of them are known.
      spread: their standard deviation (n - 1), NaN likewise or for one ray.
      median: of the radii, known also if some are infinite.
      n_reached: the number of rays along which the measure rose by the amount.
    """

    radii: Floats
    mean: float
    spread: float
    median: float
    n_reached: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Rays(Measured):
    """Measures along random directions from one set of weights.

    Attributes:
      radii: increasing from 0, of shape (m,).
      measures: by name, values of shape (n rays, m); NaN where there is none.
      norm: the Euclidean norm of the weights that move.
      seed: of the directions.
      normalization: "unit": radii are distances in weight space. "filter": radii are relative to
        the norm of each filter.
      move_vectors: whether weights of one dimension or none (biases, batch norm) moved.
      name: what the weights are called.

    >>> rays = Rays(radii=[0, 1, 2], measures={"loss": [[1, 2, 5], [1, 3, 5]]}, norm=9, seed=0)
    >>> rise = rays.rise(0.5)
    >>> rise.radii, rise.mean
    (array([0.5 , 0.25]), 0.375)
    """

    kind: ClassVar[str] = "rays"

    radii: Floats
    measures: Mapping[str, Floats]
    norm: float
    seed: int
    normalization: Normalization = "unit"
    move_vectors: bool = True
    name: str = "w"

    def __post_init__(self) -> None:
        measures = {key: np.asarray(values) for key, values in self.measures.items()}
        n = next(iter(measures.values())).shape[0] if measures else 0
        self._freeze(["radii"], (n, np.size(self.radii)))
        object.__setattr__(self, "norm", float(self.norm))
        object.__setattr__(self, "seed", operator.index(self.seed))
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization is {self.normalization!r}")
        if not isinstance(self.move_vectors, bool) or not isinstance(self.name, str):
            raise TypeError("move_vectors is True or False, and name a string")
        refuse_unordered(self.radii, "radii")
        if not self.radii.size or self.radii[0] != 0:
            raise ValueError("radii begin at 0, where the weights are")

    def _shape(self) -> tuple[int, ...]:
        return self.values().shape

    @classmethod
    def _read(cls, saved: dict[str, Any]) -> dict[str, Any]:
        return saved | {
            "radii": numbers(saved["radii"]),
            "measures": {key: numbers(values) for key, values in saved["measures"].items()},
            "norm": numbers(saved["norm"]),
        }

    def rise(self, amount: float, measure: str | None = None) -> Rise:
        """The radius at which a measure has first risen by an amount above that of the weights.

        Between radii it is interpolated linearly. Networks are compared at the same amount.

        Args:
          amount: how far it is to rise, above 0, in the units of the measure.
          measure: which; by default the first.

        Raises:
          ValueError: an amount of 0 or less.
        """
        if not amount > 0:
            raise ValueError(f"a rise must be above 0, got {amount}")
        found = self.values(measure)
        radii = frozen_array([_crossing(self.radii, row, row[0] + amount) for row in found])
        reached = np.isfinite(radii)
        is_known, n = bool(reached.all()), radii.size
        return Rise(
            radii,
            float(radii.mean()) if is_known else np.nan,
            float(radii.std(ddof=1)) if is_known and n > 1 else np.nan,
            _median(radii),
            int(reached.sum()),
        )

    def draw(self, ax: Any = None, **options: Any) -> Any:
        """Draws with matplotlib; see ``swa_core.plots.drawing.draw_rays``. Returns the axes."""
        from swa_core.plots.drawing import draw_rays

        return draw_rays(self, ax, **options)


def _crossing(radii: Floats, values: Floats, level: float) -> float:
    """Where values first reach a level: inf if nowhere, NaN if one is missing before."""
    for place, value in enumerate(values):
        if np.isnan(value):
            return float("nan")
        if value >= level:
            before = values[place - 1]
            share = (level - before) / (value - before) if np.isfinite(value) else 0.0
            return float(radii[place - 1] + share * (radii[place] - radii[place - 1]))
    return float("inf")


def _median(radii: Floats) -> float:
    if np.isnan(radii).any():
        return float("nan")
    ordered = np.sort(radii)
    low, high = ordered[(radii.size - 1) // 2], ordered[radii.size // 2]
    return float(high) if np.isinf(high) else float((low + high) / 2)
