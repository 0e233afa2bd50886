"""The leaves of any JAX pytree by their paths, and which of them are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_core import StructureError
from swa_core.trees import accumulator_dtype
from swa_optax.variables import is_variable

Tree = Any


class Path(tuple[Any, ...]):
    """The place of a leaf: a key for dictionaries that prints as ``dense/kernel``.

    It holds the bare names, so that a model of attributes and its parameters in a dictionary have
    the same paths. Printed paths may coincide (``{"a/b": 1, "a": {"b": 2}}``); the paths themselves
    do not.

    >>> [str(path) for path in leaves({"dense": {"bias": 1, "kernel": (2, 3)}})]
    ['dense/bias', 'dense/kernel/0', 'dense/kernel/1']
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "/".join(map(str, self))


def leaves(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """The leaves of any pytree by path, in order; None and ``MaskedNode`` hold none.

    Raises:
      StructureError: a container of one's own gives two of its children the same key.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    places = _variables(tree) if found else set()
    by_path: dict[Path, Any] = {}
    for entries, leaf in found:
        path = _path(entries, places)
        if path in by_path:
            raise StructureError(
                f"two leaves have the path '{path}'.",
                hint="a container registered with jax.tree_util must give each of its children a "
                "key of its own.",
            )
        by_path[path] = leaf
    return by_path


def map_with_path(function: Callable[[Path, Any], Any], tree: Tree) -> Tree:
    """The tree with each leaf replaced by ``function(path, leaf)``."""
    new = [function(path, leaf) for path, leaf in leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def _variables(tree: Tree) -> set[tuple[Any, ...]]:
    """Where nnx keeps an array in an object; its attribute is no part of a path."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return {entries for entries, part in found if is_variable(part)}


def _path(entries: tuple[Any, ...], variables: set[tuple[Any, ...]]) -> Path:
    for end in range(len(entries) if variables else 0):
        if entries[:end] in variables:
            entries = (*entries[:end], *entries[end + 1 :])
            break
    return Path(map(_key, entries))


def _key(entry: Any) -> Any:
    for kind in ("key", "name", "idx"):
        if hasattr(entry, kind):
            return getattr(entry, kind)
    return entry


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf joins the average: floating or complex, and no key, integer or boolean.

    >>> [is_averaged(leaf) for leaf in (jnp.zeros(1), 1.0, 3, True, jax.random.key(0))]
    [True, True, False, False, False]
    """
    return is_array(leaf) and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def is_array(leaf: Any) -> bool:
    """Whether JAX computes with a leaf; it does not with the functions in a model of Equinox.

    >>> [is_array(leaf) for leaf in (jnp.zeros(1), np.float32(1), 1.0, jnp.tanh, "float32")]
    [True, True, True, False, False]
    """
    if isinstance(leaf, (bool, int, float, complex)):
        return True
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return False
    # Strings, dates and objects are arrays of numpy's, and none of JAX'.
    return not isinstance(leaf.dtype, np.dtype) or leaf.dtype.kind not in "OSUMm"


def averaged_leaves(tree: Tree) -> dict[Path, Any]:
    """The leaves that join the average, by path."""
    return {path: leaf for path, leaf in leaves(tree).items() if is_averaged(leaf)}


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf as JAX computes with it (a Python float, too)."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def average_dtype(leaf: Any) -> np.dtype[Any]:
    """The dtype in which a leaf is averaged: float32 or wider.

    >>> average_dtype(jnp.zeros(2, jnp.bfloat16))
    dtype('float32')
    """
    return accumulator_dtype(jnp.result_type(leaf))
