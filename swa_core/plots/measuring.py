"""Measures of weights at places: what walks along lines, over planes and along rays."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from swa_core.errors import NonFiniteStatisticsError
from swa_core.plots import vectors
from swa_core.plots.curves import Line, Rays
from swa_core.plots.directions import Normalization, moved, random_direction
from swa_core.plots.geometry import LineThrough, PlaneThrough
from swa_core.plots.measured import Floats
from swa_core.plots.plane import Plane
from swa_core.plots.progress import Progress, counting
from swa_core.trees import Tree

Measure = Callable[[Tree], "float | Mapping[str, float]"]

_POSITIONS = np.arange(-5, 16) / 10
_DEFAULT_NAME = "loss"


def loss_line(
    first: Tree,
    second: Tree,
    measure: Measure,
    *,
    positions: Sequence[float] | None = None,
    names: tuple[str, str] = ("w1", "w2"),
    progress: Progress = False,
) -> Line:
    """Measures weights along the line through two sets of them.

    Args:
      first: a pytree of numpy arrays, at position 0.
      second: another of the same structure, at position 1.
      measure: weights -> a number, or numbers by name (``{"test error [%]": ..., ...}``); the first
        is the one that is drawn. It is given float32 or wider weights. NaN is a hole in the curve.
      positions: where to measure; 0 and 1 always are. By default 21, from -0.5 to 1.5.
      names: what to call the two.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Raises:
      StructureError: the two are not of one network.
      GeometryError: they are the same, or hold NaN or Inf.
      TypeError: ``measure`` does not return numbers, or not the same ones everywhere.

    >>> line = loss_line({"w": np.float32([0])}, {"w": np.float32([2])},
    ...                  lambda weights: float((weights["w"][0] - 1) ** 2), positions=[0.5, 1.5])
    >>> line.positions, line.values()
    (array([0. , 0.5, 1. , 1.5]), array([1., 0., 1., 4.]))
    """
    through = LineThrough(first, second)
    at = _POSITIONS if positions is None else np.union1d(_places(positions), [0.0, 1.0])
    with ExitStack() as stack:
        values = _Values(measure, stack.enter_context(counting(progress, at.size)))
        # The ends first: they tell at once whether there is something wrong with the measure.
        for position in sorted(at, key=lambda position: position not in (0, 1)):
            values.add(float(position), through.at(position))
    return Line(
        positions=at,
        measures=values.arrays(float(position) for position in at),
        length=through.length,
        names=names,
    )


def loss_plane(
    first: Tree,
    second: Tree,
    third: Tree,
    measure: Measure,
    *,
    points: int | tuple[int, int] = 21,
    margin: float = 0.25,
    x: Sequence[float] | None = None,
    y: Sequence[float] | None = None,
    names: tuple[str, str, str] = ("w1", "w2", "w_SWA"),
    progress: Progress = False,
) -> Plane:
    """Measures weights over the plane through three sets of them.

    Args:
      first: a pytree of numpy arrays, the origin.
      second: another of the same structure, which the first axis points to.
      third: likewise, on the positive side of the second axis; the average, say.
      measure: weights -> a number, or numbers by name, as for ``loss_line``.
      points: how many along each axis, or along x and y: 21 are 441 measurements.
      margin: how far the grid goes beyond the three, relative to the larger of the two extents.
      x: the coordinates to measure at, in distances in weight space, instead of ``points``.
      y: likewise.
      names: what to call the three.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Raises:
      StructureError: the three are not of one network.
      GeometryError: two are the same, all are on one line, or one holds NaN or Inf.
      TypeError: ``measure`` does not return numbers, or not the same ones everywhere.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.3.

    >>> weights = [{"w": np.float32(w)} for w in ([0, 0], [2, 0], [1, 1])]
    >>> plane = loss_plane(*weights, lambda w: float((w["w"] ** 2).sum()), x=[0, 2], y=[0, 1])
    >>> plane.values()
    array([[0., 4.],
           [1., 5.]])
    """
    through = PlaneThrough(first, second, third)
    if len(set(names)) < 3:
        raise ValueError(f"three sets of weights need three names, got {names}")
    n_x, n_y = (points, points) if isinstance(points, int) else points
    places_x, places_y = np.transpose(through.corners)
    beyond = margin * max(np.ptp(places_x), np.ptp(places_y))
    xs = _grid(places_x, beyond, n_x) if x is None else np.unique(_places(x))
    ys = _grid(places_y, beyond, n_y) if y is None else np.unique(_places(y))
    with ExitStack() as stack:
        values = _Values(measure, stack.enter_context(counting(progress, xs.size * ys.size + 3)))
        for name, corner in zip(names, (first, second, third), strict=True):
            values.add(name, vectors.widened(corner))
        for down in ys:
            for across in xs:
                values.add((float(across), float(down)), through.at(across, down))
    grid = values.arrays((float(across), float(down)) for down in ys for across in xs)
    return Plane(
        x=xs,
        y=ys,
        measures={name: array.reshape(ys.size, xs.size) for name, array in grid.items()},
        corners=dict(zip(names, through.corners, strict=True)),
        at_corners=values.arrays(names),
    )


def loss_rays(
    center: Tree,
    measure: Measure,
    *,
    directions: int = 10,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    normalization: Normalization = "unit",
    filter_axis: int = -1,
    move_vectors: bool = True,
    fixed: Collection[str] = (),
    name: str = "w",
    progress: Progress = False,
) -> Rays:
    """Measures weights along random directions: how flat it is around them.

    To compare two sets of weights, measure both at the same ``radii`` with the same ``seed``.

    Args:
      center: a pytree of numpy arrays.
      measure: weights -> a number, or numbers by name, as for ``loss_line``.
      directions: how many rays.
      radii: where to measure along each; 0 always is. By default 11 from 0 to half the norm of the
        weights that move (for "filter": to 0.5).
      seed: of the directions.
      normalization: "unit": radii are distances in weight space. "filter": each filter moves in
        proportion to its norm; see ``random_direction``.
      filter_axis: the axis that counts filters: -1 for Keras and flax, 0 for torch.
      move_vectors: whether leaves of one dimension or none (biases, batch norm) move.
      fixed: the paths of leaves that stay.
      name: what to call the weights.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Raises:
      StructureError: no weights that move.
      GeometryError: the weights hold NaN or Inf.
      TypeError: ``measure`` does not return numbers, or not the same ones everywhere.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.4; Li et al. 2018, arXiv:1712.09913.

    >>> center = {"w": np.zeros(3, np.float32)}
    >>> rays = loss_rays(center, lambda weights: float((weights["w"] ** 2).sum()),
    ...                  directions=2, radii=[1, 2])
    >>> rays.values().round(4).tolist()
    [[0.0, 1.0, 4.0], [0.0, 1.0, 4.0]]
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    norm = math.sqrt(vectors.squared_norm(moved(center, move_vectors=move_vectors, fixed=fixed)))
    if radii is None:
        at = np.arange(11) / 20 * (norm if normalization == "unit" and norm > 0 else 1.0)
    else:
        at = np.union1d(_places(radii), [0.0])
    if at[0] < 0:
        raise ValueError(f"radii must be at least 0, got {at[0]}")
    total = directions * (at.size - 1) + 1
    with ExitStack() as stack:
        values = _Values(measure, stack.enter_context(counting(progress, total)))
        for ray in range(directions):
            direction = random_direction(
                center,
                (seed, ray),
                normalization=normalization,
                filter_axis=filter_axis,
                move_vectors=move_vectors,
                fixed=fixed,
            )
            if not ray:
                values.add(0.0, vectors.widened(center))
            for radius in at[1:]:
                values.add((ray, float(radius)), direction.at(radius))
    keys = [(ray, float(r)) if r else 0.0 for ray in range(directions) for r in at]
    return Rays(
        radii=at,
        measures={
            key: array.reshape(directions, at.size) for key, array in values.arrays(keys).items()
        },
        norm=norm,
        seed=seed,
        normalization=normalization,
        move_vectors=move_vectors,
        name=name,
    )


class _Values:
    """What was measured, by place; the same measures everywhere."""

    def __init__(self, measure: Measure, step: Callable[[], None]) -> None:
        self._measure = measure
        self._step = step
        self._found: dict[Any, dict[str, float] | None] = {}
        self._names: list[str] | None = None

    def add(self, place: Any, weights: Tree) -> None:
        try:
            measured: Any = self._measure(weights)
        except NonFiniteStatisticsError:
            self._found[place] = None  # far out, activations overflow
        else:
            self._found[place] = self._named(measured)
        self._step()

    def arrays(self, places: Iterable[Any]) -> dict[str, Floats]:
        """By name of the measure, the values at these places, in their order."""
        found = [self._found[place] for place in places]
        return {
            name: np.array([math.nan if here is None else here[name] for here in found])
            for name in self._names or [_DEFAULT_NAME]
        }

    def _named(self, measured: Any) -> dict[str, float]:
        given = measured if isinstance(measured, Mapping) else {_DEFAULT_NAME: measured}
        try:
            values = {str(name): float(value) for name, value in given.items()}
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"measure returned {measured!r}: expected a number, or numbers by name ({error})"
            ) from error
        if not values:
            raise TypeError("measure returned no numbers")
        if self._names is None:
            self._names = list(values)
        elif set(values) != set(self._names):
            raise TypeError(f"measure returned {list(values)}, and {self._names} before")
        return values


def _places(values: Any) -> Floats:
    places = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(places).all():
        raise ValueError("places to measure at must be finite numbers")
    return places


def _grid(corners: Any, beyond: float, number: int) -> Floats:
    if number < 2:
        raise ValueError(f"a grid needs at least 2 points along each axis, got {number}")
    return np.linspace(corners.min() - beyond, corners.max() + beyond, number)
