"""Lines and planes through weights, with distances in weight space for coordinates.

The distance is the Euclidean one over all weights (leaves that are floating-point arrays).
"""

from __future__ import annotations

import math

from swa_core.errors import GeometryError
from swa_core.plots import vectors
from swa_core.trees import Tree

_FLAT = 1e-6  # of the side: what three weights may stand off a line and still be on it


class LineThrough:
    """The line through two sets of weights.

    Args:
      first: a pytree of weights, at position 0.
      second: another of the same structure, at position 1.

    Attributes:
      length: the distance between the two.

    Raises:
      StructureError: they are not of one network.
      GeometryError: they are the same, or hold NaN or Inf.

    >>> import numpy as np
    >>> line = LineThrough({"w": np.float32([0, 0])}, {"w": np.float32([3, 4])})
    >>> line.length, line.at(2)
    (5.0, {'w': array([6., 8.], dtype=float32)})
    """

    def __init__(self, first: Tree, second: Tree) -> None:
        self._tree = first
        self._first = vectors.moving(first)
        self._second = vectors.matched(self._first, second, "the second set of weights")
        squared = float(vectors.gram(self._first, [self._second])[0, 0])
        refuse_nonfinite(squared)
        if not squared:
            raise GeometryError(
                "both sets of weights are the same, so there is no line through them.",
                hint="take copies of weights: a state dict, for one, changes with its model.",
            )
        self.length = math.sqrt(squared)

    def at(self, position: float) -> Tree:
        """The weights at a position: 0 is the first set, 1 the second, any number between and
        beyond; float32 or wider, in memory of their own."""
        return vectors.walked(
            self._tree, self._first, [(float(position), self._second)], towards=True
        )


class PlaneThrough:
    """The plane through three sets of weights.

    The origin is the first; the first axis points to the second; the second axis is orthogonal to
    it, on the side of the third. Coordinates are distances in weight space.

    Args:
      first: a pytree of weights.
      second: another of the same structure.
      third: likewise.

    Attributes:
      corners: the coordinates of the three.

    Raises:
      StructureError: they are not of one network.
      GeometryError: two are the same, all are on one line (within what the rounding of the
        weights can tell), or one holds NaN or Inf.

    Source:
      Garipov et al. 2018, arXiv:1802.10026, appendix; Izmailov et al. 2018, arXiv:1803.05407,
      sec. 3.3.

    >>> import numpy as np
    >>> weights = [{"w": np.float32(w)} for w in ([0, 0, 1], [4, 0, 1], [1, 2, 1])]
    >>> plane = PlaneThrough(*weights)
    >>> plane.corners
    ((0.0, 0.0), (4.0, 0.0), (1.0, 2.0))
    >>> plane.at(-1, 1)
    {'w': array([-1.,  1.,  1.], dtype=float32)}
    """

    def __init__(self, first: Tree, second: Tree, third: Tree) -> None:
        self._tree = first
        self._first = vectors.moving(first)
        self._second = vectors.matched(self._first, second, "the second set of weights")
        self._third = vectors.matched(self._first, third, "the third set of weights")
        products = vectors.gram(self._first, [self._second, self._third])
        for value in products.flat:
            refuse_nonfinite(float(value))
        side, other = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
        for distance, which in ((side, "second"), (other, "third")):
            if not distance:
                raise _flat(f"the first and the {which} set of weights are the same")
        foot = float(products[0, 1]) / side
        # Not by Pythagoras: of nearly collinear weights it would keep no digit.
        height = self._height(foot / side)
        noise = min(vectors.resolution(w) for w in (self._first, self._second, self._third))
        if height <= max(_FLAT * max(side, other), noise):
            raise _flat(
                f"the three sets of weights are on one line: the third is {height:.3g} away from "
                f"that through the others, which are {side:.3g} apart"
            )
        self.corners = ((0.0, 0.0), (side, 0.0), (foot, height))

    def _height(self, share: float) -> float:
        """The distance of the third from the line through the others, whose foot is known."""
        foot = vectors.walked(self._first, self._first, [(share, self._second)], towards=True)
        return math.sqrt(float(vectors.gram(self._third, [foot])[0, 0]))

    def at(self, x: float, y: float) -> Tree:
        """The weights at a place of the plane: float32 or wider, in memory of their own."""
        (_, _), (side, _), (foot, height) = self.corners
        to_third = y / height
        to_second = (x - foot * to_third) / side
        steps = [(float(to_second), self._second), (float(to_third), self._third)]
        return vectors.walked(self._tree, self._first, steps, towards=True)

    def coordinates(self, weights: Tree) -> tuple[float, float, float]:
        """Where other weights are: their place in the plane, and their distance from it.

        Raises:
          StructureError: they are not of this network.

        >>> import numpy as np
        >>> plane = PlaneThrough(*({"w": np.float64(w)} for w in ([0, 0, 0], [4, 0, 0], [1, 2, 0])))
        >>> plane.coordinates({"w": np.float64([3, 1, -7])})
        (3.0, 1.0, 7.0)
        """
        there = vectors.matched(self._first, weights, "the set of weights")
        products = vectors.gram(self._first, [self._second, self._third, there])
        (_, _), (side, _), (foot, height) = self.corners
        x = float(products[0, 2]) / side
        y = (float(products[1, 2]) - foot * x) / height
        below = vectors.moving(self.at(x, y))
        return x, y, math.sqrt(float(vectors.gram(below, [there])[0, 0]))


def refuse_nonfinite(squared: float) -> None:
    """Raises ``GeometryError`` for a squared distance between weights with NaN or Inf."""
    if not math.isfinite(squared):
        raise GeometryError(
            "a set of weights holds NaN or Inf, so no distance can be told.",
            hint="take weights from before the training diverged.",
        )


def _flat(what: str) -> GeometryError:
    return GeometryError(
        f"{what}, so there is no plane through them.",
        hint="take three sets of weights that form a triangle; the average of two snapshots is on "
        "the line between them, that of three or more is not.",
    )
