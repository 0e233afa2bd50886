"""Pytrees of weights as vectors: products and sums in float64, in blocks, without whole copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from swa_core import trees
from swa_core.errors import StructureError
from swa_core.trees import Tree

Array = npt.NDArray[Any]
_BLOCK = 1 << 16  # elements; a few blocks of doubles stay in the cache


def moving(tree: Tree) -> dict[str, Array]:
    """The leaves that are weights, by path: floating-point and complex ones.

    Raises:
      StructureError: two leaves have the same path, or none is a weight.

    >>> list(moving({"w": np.zeros(2), "steps": np.int32(1), "none": None}))
    ['w']
    """
    arrays = {path: np.asarray(leaf) for path, leaf in trees.by_path(tree).items()}
    found = {path: leaf for path, leaf in arrays.items() if trees.is_inexact(leaf.dtype)}
    if not found:
        raise StructureError(
            "there are no weights: no leaf of the tree is a floating-point array.",
            hint="pass a pytree (dict, list, tuple) of arrays.",
        )
    return found


def matched(first: dict[str, Array], other: Tree, name: str) -> dict[str, Array]:
    """The weights of another tree, in the order of the first.

    Args:
      first: the weights that the others are to be like.
      other: the tree.
      name: what it is called in a message.

    Raises:
      StructureError: naming the first leaf that is missing, new, or of another shape.
    """
    found = moving(other)
    hint = "a line or a plane goes through weights of one network."
    for path, leaf in first.items():
        if path not in found:
            raise StructureError(f"{name} has no leaf '{path}'.", hint=hint)
        if found[path].shape != leaf.shape:
            raise StructureError(
                f"leaf '{path}' of {name} has shape {found[path].shape}, and {leaf.shape} before.",
                hint=hint,
            )
    if new := [path for path in found if path not in first]:
        raise StructureError(f"{name} has a leaf '{new[0]}' more.", hint=hint)
    return {path: found[path] for path in first}


def gram(origin: dict[str, Array], others: Sequence[dict[str, Array]]) -> Array:
    """The inner products of the differences to an origin; real, float64.

    Args:
      origin: weights by path.
      others: of the same shapes.

    Returns:
      A symmetric matrix of shape (len(others), len(others)).

    >>> one = {"w": np.float32([1, 1])}
    >>> gram(one, [{"w": np.float32([1, 3])}, {"w": np.float32([2, 2])}])
    array([[4., 2.],
           [2., 2.]])
    """
    number = len(others)
    total = np.zeros((number, number))
    for path, start in origin.items():
        for pieces in _blocks([start, *(other[path] for other in others)]):
            with np.errstate(invalid="ignore"):  # Inf - Inf; the caller looks at the result
                steps = [piece - pieces[0] for piece in pieces[1:]]
            for i in range(number):
                for j in range(i, number):
                    total[i, j] += np.vdot(steps[i], steps[j]).real
    return total + np.triu(total, 1).T


def squared_norm(weights: dict[str, Array]) -> float:
    """The sum of the squares of all weights, in float64.

    >>> squared_norm({"w": np.float32([3, 4])})
    25.0
    """
    return sum(
        float(np.vdot(piece, piece).real)
        for leaf in weights.values()
        for (piece,) in _blocks([leaf])
    )


def walked(
    tree: Tree,
    origin: dict[str, Array],
    steps: Sequence[tuple[float, dict[str, Array]]],
    *,
    towards: bool,
) -> Tree:
    """A tree like the given one with other weights: the origin, and steps from it.

    Args:
      tree: whose containers and other leaves (integers, None) the result has.
      origin: its weights by path.
      steps: a factor, and by path the weights to walk towards or the direction to walk in; paths
        that are missing stay.
      towards: whether they are weights to walk towards.

    Returns:
      The tree, its weights in float32 or wider and in memory of their own. The sums are made in
      float64; one step by a factor of 1 towards weights gives these weights to the bit.
    """

    arrives = towards and [factor for factor, _ in steps] == [1.0]

    def place(path: str, leaf: Any) -> Any:
        if path not in origin:
            return leaf
        if arrives:
            array = steps[0][1][path]
            return array.astype(trees.accumulator_dtype(array.dtype), copy=True)
        there = [(factor, to[path]) for factor, to in steps if factor and path in to]
        dtypes = [trees.accumulator_dtype(a.dtype) for a in (origin[path], *(a for _, a in there))]
        out = np.empty(origin[path].shape, np.result_type(*dtypes))
        flat, done = out.reshape(-1), 0
        for pieces in _blocks([origin[path], *(array for _, array in there)]):
            total = pieces[0].copy()
            for (factor, _), piece in zip(there, pieces[1:], strict=True):
                total += factor * ((piece - pieces[0]) if towards else piece)
            flat[done : done + total.size] = total
            done += total.size
        return out

    return trees.map_with_path(place, tree)


def widened(tree: Tree) -> Tree:
    """The tree with its weights in float32 or wider, as all weights are that are measured.

    >>> widened({"w": np.float16([1]), "steps": 3})
    {'w': array([1.], dtype=float32), 'steps': 3}
    """
    return walked(tree, moving(tree), [], towards=True)


def resolution(weights: dict[str, Array]) -> float:
    """How far rounding may move weights, in their own dtypes: a distance in weight space.

    >>> resolution({"w": np.float32([3.0, 4.0])}) / 2.0**-23
    5.0
    """
    squared: float = sum(
        _epsilon(leaf.dtype) ** 2 * squared_norm({path: leaf}) for path, leaf in weights.items()
    )
    return math.sqrt(squared)


def _epsilon(dtype: np.dtype[Any]) -> float:
    if dtype.kind in "fc":
        return float(np.finfo(dtype).eps)
    return 2.0**-7  # bfloat16's; narrower ones of ml_dtypes are coarser still


def _blocks(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    """Matching pieces of arrays, as vectors in double precision."""
    flat = [array.reshape(-1) for array in arrays]
    wide = [np.complex128 if array.dtype.kind == "c" else np.float64 for array in arrays]
    for begin in range(0, flat[0].size, _BLOCK):
        yield [
            array[begin : begin + _BLOCK].astype(dtype, copy=False)
            for array, dtype in zip(flat, wide, strict=True)
        ]
