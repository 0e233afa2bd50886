"""Curves drawn with matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from swa_core.plots.curves import Line, Rays
from swa_core.plots.measured import Floats
from swa_core.plots.plane import Plane

_FINEST = 0.01  # the lowest level above the minimum, relative to the highest


def draw_line(
    line: Line,
    ax: Any = None,
    *,
    measure: str | None = None,
    label: str | None = None,
    **style: Any,
) -> Any:
    """Draws a measure along a line.

    Args:
      line: the data.
      ax: the axes to draw into; by default those of a new figure.
      measure: which; by default the first.
      label: for the legend.
      style: what ``Axes.plot`` takes (``color``, ``linewidth``).

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    ax = _axes(ax)
    name = line.named(measure)
    ax.plot(line.positions, line.values(name), label=label, **style)
    for position in (0, 1):
        ax.axvline(position, color="grey", linewidth=0.8, linestyle=":")
    first, second = map(pretty, line.names)
    ax.set_xlabel(
        f"position on the line: 0 is {first}, 1 is {second} ({line.length:.3g} apart in weight "
        "space)"
    )
    ax.set_ylabel(name)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def draw_plane(
    plane: Plane,
    ax: Any = None,
    *,
    measure: str | None = None,
    levels: int | Sequence[float] = 8,
    highest: float | None = None,
    colors: str = "viridis_r",
    colorbar: bool = True,
) -> Any:
    """Draws a measure over a plane as filled contours, with the three sets of weights.

    Args:
      plane: the data.
      ax: the axes to draw into; by default those of a new figure.
      measure: which; by default the first.
      levels: the values of the contours, or how many. Their distances from the lowest value then
        grow by a factor, because a loss rises by orders of magnitude around a minimum.
      highest: the highest level; what is above has one colour. By default the 90th percentile of
        the values.
      colors: a colour map of matplotlib.
      colorbar: whether to draw one beside the axes, with the levels.

    Returns:
      The axes, with the same scale in both directions.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: fewer than 2 levels.
    """
    ax = _axes(ax)
    name = plane.named(measure)
    values = np.ma.masked_invalid(plane.values(name))
    if values.count():
        # Each band has one colour, in equal steps, whatever the distance of the levels.
        bounds = log_levels(plane.values(name), levels, highest)
        beyond = "both" if values.min() < bounds[0] else "max"
        steps = _module("matplotlib.colors").BoundaryNorm(bounds, 256, extend=beyond)
        drawn = ax.contourf(
            plane.x, plane.y, values, bounds, cmap=colors, norm=steps, extend=beyond
        )
        ax.contour(plane.x, plane.y, values, bounds, colors="white", linewidths=0.6)
        if colorbar:
            bar = ax.figure.colorbar(drawn, ax=ax, label=name, ticks=bounds)
            bar.ax.set_yticklabels([f"{bound:.4g}" for bound in bounds])
    for marker, (corner, (x, y)) in zip("osD", plane.corners.items(), strict=False):
        ax.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=6)
        ax.annotate(
            pretty(corner),
            (x, y),
            xytext=(6, 6),
            textcoords="offset points",
            bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.7},
        )
    first, second, _ = map(pretty, plane.corners)
    ax.set_xlabel(f"distance in weight space from {first} towards {second}")
    ax.set_ylabel("distance in weight space, orthogonal to it")
    ax.set_aspect("equal")
    return ax


def draw_rays(
    rays: Rays,
    ax: Any = None,
    *,
    measure: str | None = None,
    label: str | None = None,
    **style: Any,
) -> Any:
    """Draws a measure along each ray, thin, and its mean over the rays, thick.

    The mean has a hole at a radius where any ray has one. Draw several sets of weights into one
    axes to compare them.

    Args:
      rays: the data.
      ax: the axes to draw into; by default those of a new figure.
      measure: which; by default the first.
      label: for the legend; by default the name of the weights.
      style: what ``Axes.plot`` takes (``color``).

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    ax = _axes(ax)
    name = rays.named(measure)
    values = rays.values(name)
    label = pretty(rays.name) if label is None else label
    (mean,) = ax.plot(rays.radii, values.mean(axis=0), label=label, **{"linewidth": 2, **style})
    for ray in values:
        ax.plot(rays.radii, ray, color=mean.get_color(), linewidth=0.6, alpha=0.4)
    if rays.normalization == "filter":
        ax.set_xlabel("distance along random rays, relative to the norm of each filter")
    else:
        ax.set_xlabel("distance along random rays, in weight space")
    ax.set_ylabel(name)
    ax.legend(frameon=False)
    return ax


def log_levels(
    values: Floats, levels: int | Sequence[float] = 8, highest: float | None = None
) -> Floats:
    """Levels of contours, whose distances from the lowest value grow by a constant factor.

    Args:
      values: what is to be drawn, of any shape; what is not finite does not count.
      levels: how many, at least 2; or the levels themselves.
      highest: the last one; by default the 90th percentile of the values.

    Returns:
      Increasing levels, the lowest value first.

    Raises:
      ValueError: fewer than 2 levels.

    >>> log_levels(np.array([1.0, 2.0, np.nan]), 3, highest=2.0)
    array([1.  , 1.01, 2.  ])
    """
    if not isinstance(levels, int):
        found = np.unique(np.asarray(levels, dtype=np.float64))
        if found.size < 2:
            raise ValueError(f"contours need at least 2 levels, got {levels}")
        return found
    if levels < 2:
        raise ValueError(f"contours need at least 2 levels, got {levels}")
    finite = values[np.isfinite(values)]
    lowest = float(finite.min())
    top = float(np.quantile(finite, 0.9)) if highest is None else float(highest)
    # Of values that are all the same there is nothing to see, but a picture to be drawn.
    above = top - lowest if top > lowest else max(abs(lowest), 1.0) * 1e-3
    return np.concatenate([[lowest], lowest + above * np.geomspace(_FINEST, 1.0, levels - 1)])


def pretty(name: str) -> str:
    """A name as matplotlib sets it: ``w1`` and ``w_SWA`` with an index, others as they are.

    >>> pretty("w_SWA"), pretty("w1"), pretty("epoch 160")
    ('$w_{\\\\mathrm{SWA}}$', '$w_{\\\\mathrm{1}}$', 'epoch 160')
    """
    found = re.fullmatch(r"([A-Za-z])(?:_([A-Za-z0-9]+)|([0-9]+))", name)
    if not found:
        return name
    letter, word, number = found.groups()
    return rf"${letter}_{{\mathrm{{{word or number}}}}}$"


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    return _module("matplotlib.pyplot").subplots()[1]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "drawing needs matplotlib, which is not installed. Install it (pip install "
            "matplotlib), or take the numbers: values(), to_dict().",
            name="matplotlib",
        ) from error
