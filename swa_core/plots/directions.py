"""Random directions in weight space."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import numpy as np

from swa_core.errors import GeometryError, StructureError
from swa_core.plots import vectors
from swa_core.plots.geometry import refuse_nonfinite
from swa_core.plots.vectors import Array
from swa_core.trees import Tree

Normalization = Literal["unit", "filter"]


class Direction:
    """A direction from weights, to walk in.

    Args:
      center: a pytree of weights.
      steps: by path, what is added to the weights at radius 1; paths that are missing stay.

    >>> at = Direction({"w": np.float32([1, 1])}, {"w": np.float32([0, 1])}).at
    >>> at(0.5)
    {'w': array([1. , 1.5], dtype=float32)}
    """

    def __init__(self, center: Tree, steps: dict[str, Array]) -> None:
        self._tree = center
        self._center = vectors.moving(center)
        self._steps = steps

    def at(self, radius: float) -> Tree:
        """The weights at a radius: float32 or wider, in memory of their own."""
        return vectors.walked(
            self._tree, self._center, [(float(radius), self._steps)], towards=False
        )


def random_direction(
    center: Tree,
    seed: int | tuple[int, ...],
    *,
    normalization: Normalization = "unit",
    filter_axis: int = -1,
    move_vectors: bool = True,
    fixed: Collection[str] = (),
) -> Direction:
    """A direction of independent normal numbers, all directions being equally likely.

    Args:
      center: a pytree of weights, from which it goes.
      seed: the same one gives the same direction, for weights of the same shapes in the same order.
      normalization: "unit" makes a step of radius 1 as long as 1 in weight space. "filter" makes
        the step of each filter as long as the filter itself, so that networks whose weights differ
        in scale alone (which batch norm undoes) are treated alike; radii are then relative.
      filter_axis: the axis of a leaf that counts its filters, for "filter": -1 for the kernels of
        Keras and flax, 0 for the weights of torch.
      move_vectors: whether leaves of one dimension or none (biases, batch norm) are moved. For
        "filter", such a leaf is one filter.
      fixed: the paths of leaves that stay.

    Raises:
      StructureError: no leaf is left that moves, or ``fixed`` names one that is not there.
      GeometryError: the weights hold NaN or Inf; for "filter", they are all zero.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.4 ("unit"); Li et al. 2018, arXiv:1712.09913,
      sec. 4 ("filter").

    >>> center = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    >>> step = random_direction(center, 0).at(2.0)
    >>> round(float(np.sqrt((step["kernel"] ** 2).sum() + (step["bias"] ** 2).sum())), 5)
    2.0
    >>> random_direction(center, 0, move_vectors=False).at(2.0)["bias"]
    array([0., 0.], dtype=float32)
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f'normalization must be "unit" or "filter", got {normalization!r}')
    chosen = moved(center, move_vectors=move_vectors, fixed=fixed)
    refuse_nonfinite(vectors.squared_norm(chosen))
    random = np.random.default_rng(seed)
    steps = {path: _normal(random, leaf) for path, leaf in chosen.items()}
    if normalization == "filter":
        for path, leaf in chosen.items():
            steps[path] *= _scales(leaf, steps[path], filter_axis)
        if not vectors.squared_norm(steps):
            raise GeometryError(
                "all weights that would move are zero, and so would be steps of their length.",
                hint='take normalization="unit".',
            )
    else:
        length = math.sqrt(vectors.squared_norm(steps))
        for step in steps.values():
            step /= length
    return Direction(center, steps)


def moved(center: Tree, *, move_vectors: bool, fixed: Collection[str]) -> dict[str, Array]:
    """The weights that a direction moves, by path; see ``random_direction``.

    Raises:
      StructureError: there are none, or ``fixed`` names one that is not there.
    """
    weights = vectors.moving(center)
    if unknown := sorted(set(fixed) - weights.keys()):
        raise StructureError(
            f"cannot fix leaf '{unknown[0]}': there is none.", hint=f"there are {list(weights)}."
        )
    chosen = {
        path: leaf
        for path, leaf in weights.items()
        if path not in fixed and (move_vectors or leaf.ndim > 1)
    }
    if not any(leaf.size for leaf in chosen.values()):
        raise StructureError(
            "no weights are left to move.", hint="let leaves of one dimension move, or fix fewer."
        )
    return chosen


def _normal(random: np.random.Generator, leaf: Array) -> Array:
    wide = leaf.dtype.kind in "fc" and leaf.dtype.itemsize > 4 * (1 + (leaf.dtype.kind == "c"))
    dtype: Any = np.float64 if wide else np.float32
    step: Array = np.asarray(random.standard_normal(leaf.shape, dtype=dtype))
    if leaf.dtype.kind == "c":
        step = step + 1j * random.standard_normal(leaf.shape, dtype=dtype)
    return step


def _scales(leaf: Array, step: Array, axis: int) -> Array:
    """What makes each filter of a step as long as that of the weights."""
    others: tuple[int, ...] | None = None
    if leaf.ndim > 1:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"filter_axis {axis} is none of an array of shape {leaf.shape}")
        others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)

    def norms(array: Array) -> Array:
        wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
        return np.asarray(np.sqrt((np.abs(wide) ** 2).sum(axis=others, keepdims=True)))

    long, drawn = norms(leaf), norms(step)
    scales = np.divide(long, drawn, out=np.zeros_like(long), where=drawn > 0)
    shape = leaf.shape if leaf.ndim == 0 else scales.shape
    return scales.reshape(shape).astype(step.real.dtype)
