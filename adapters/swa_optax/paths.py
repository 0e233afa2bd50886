"""The leaves of any JAX pytree by their paths, and which of them are averaged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_core.trees import accumulator_dtype

Tree = Any


class Path(tuple[Any, ...]):
    """The place of a leaf: a key for dictionaries that prints as ``dense/kernel``.

    Printed paths may coincide (``{"a/b": 1, "a": {"b": 2}}``); the paths themselves do not.

    >>> [str(path) for path in leaves({"dense": {"bias": 1, "kernel": (2, 3)}})]
    ['dense/bias', 'dense/kernel/0', 'dense/kernel/1']
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "/".join(map(name, self))


def name(entry: Any) -> str:
    """One step of a path as a person writes it."""
    for kind in ("key", "name", "idx"):
        if hasattr(entry, kind):
            return str(getattr(entry, kind))
    return str(entry)


def leaves(tree: Tree) -> dict[Path, Any]:
    """The leaves of any pytree by path; None and ``MaskedNode`` hold none."""
    return {Path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf joins the average: floating or complex, and no key, integer or boolean.

    >>> [is_averaged(leaf) for leaf in (jnp.zeros(1), 1.0, 3, True, jax.random.key(0))]
    [True, True, False, False, False]
    """
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


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
