"""The arrays inside of flax nnx's variables and modules, known without importing flax.

An object of nnx can only be there if somebody imported flax; nothing here imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def is_variable(part: Any) -> bool:
    """Whether this is one of nnx's variables: an array in an object, as its trees have for leaves.

    >>> is_variable(3.0)
    False
    """
    nnx = _nnx()
    return nnx is not None and isinstance(part, nnx.Variable)


def is_model(tree: Tree) -> bool:
    """Whether there is a module of nnx in this tree, and not only the state of one."""
    nnx = _nnx()
    if nnx is None:
        return False

    kind = nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Object  # its name before flax 0.11

    def is_module(part: Any) -> bool:
        return isinstance(part, kind)

    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))


def value(part: Any) -> Any:
    """The array in a variable; anything else is its own value.

    >>> value(3.0)
    3.0
    """
    if not is_variable(part):
        return part
    return part.get_value() if hasattr(part, "get_value") else part.value  # before flax 0.12


def taken_apart(tree: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The variables of a model, and the function that makes a model of others.

    A parameter that several modules share is one in the state of a model, and many among its
    leaves; and the new model has variables of its own. Any other tree is its own state.

    >>> state, put_together = taken_apart({"w": 1.0})
    >>> put_together(state)
    {'w': 1.0}
    """
    if not is_model(tree):
        return tree, _itself
    nnx = _nnx()
    structure, state = nnx.split(tree)
    # split and merge hand on the variables themselves; a tree that is mapped gets new ones.
    return state, lambda new: nnx.merge(structure, jax.tree.map(_itself, new))


def _itself(tree: Tree) -> Tree:
    return tree


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")
