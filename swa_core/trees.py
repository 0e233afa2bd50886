"""Pytrees of weights: dicts, lists, tuples and NamedTuples of arrays, each leaf with its path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from swa_core.errors import StructureError

Tree = Any


def children(tree: Tree) -> list[tuple[str, Tree]] | None:
    """The named branches of a node, or None for a leaf. None itself is a node without branches.

    >>> children({"a": 1}), children([5]), children(3)
    ([('a', 1)], [('0', 5)], None)
    """
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return [(str(key), branch) for key, branch in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (list, tuple)):
        return [(str(place), branch) for place, branch in enumerate(tree)]
    return None


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths.

    >>> list(leaves({"dense": {"kernel": 1, "bias": 2}, "scale": [3]}))
    [('dense/kernel', 1), ('dense/bias', 2), ('scale/0', 3)]
    """
    branches = children(tree)
    if branches is None:
        yield path, tree
    else:
        for key, branch in branches:
            yield from leaves(branch, f"{path}/{key}" if path else key)


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths.

    Raises:
      StructureError: two leaves have the same path.

    >>> by_path({"dense": {"kernel": 1}, "dense/kernel": 2})
    Traceback (most recent call last):
    swa_core.errors.StructureError: two leaves have the path 'dense/kernel'.
    Hint: rename one of their keys; a '/' in it separates like one level of nesting.
    """
    found: dict[str, Any] = {}
    for path, leaf in leaves(tree):
        if path in found:
            raise StructureError(
                f"two leaves have the path '{path}'.",
                hint="rename one of their keys; a '/' in it separates like one level of nesting.",
            )
        found[path] = leaf
    return found


def map_with_path(function: Callable[[str, Any], Any], tree: Tree, path: str = "") -> Tree:
    """The tree with each leaf replaced by ``function(path, leaf)``; containers keep their type.

    >>> map_with_path(lambda path, leaf: leaf * 2, {"a": [1, 2]})
    {'a': [2, 4]}
    """
    branches = children(tree)
    if branches is None:
        return function(path, tree)
    mapped = [
        map_with_path(function, branch, f"{path}/{key}" if path else key)
        for key, branch in branches
    ]
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return _like(tree, dict(zip(tree, mapped, strict=True)))
    if hasattr(tree, "_fields"):
        return type(tree)(*mapped)
    return type(tree)(mapped)


def _like(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the kind of ``tree`` (OrderedDict, flax's FrozenDict) with these items."""
    if type(tree) is dict:
        return items
    if isinstance(tree, defaultdict):
        return defaultdict(tree.default_factory, items)
    return type(tree)(items)  # type: ignore[call-arg]


def is_inexact(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this dtype are averaged: floating or complex.

    bfloat16 and the 8-bit floats of ml_dtypes are known by their names: numpy gives them the kind
    'V', that of raw bytes.

    >>> is_inexact(np.dtype("float16")), is_inexact(np.dtype("int32"))
    (True, False)
    """
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat16", "float8", "float6", "float4"))


def accumulator_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that an average of such weights is kept in: float32 or wider.

    >>> accumulator_dtype(np.dtype("float16")), accumulator_dtype(np.dtype("float64"))
    (dtype('float32'), dtype('float64'))
    """
    if dtype.kind not in "fc":
        return np.dtype(np.float32)
    return np.promote_types(dtype, np.float32)
