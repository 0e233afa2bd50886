"""The average in the state of any optimizer; refused where it is one of weights that never were."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax

from swa_core import StateError, SWAState
from swa_optax.checking import is_state, restore_hint
from swa_optax.paths import Tree
from swa_optax.variables import value

# Wrappers that do not pass on the updates of an inner optimizer, by their state and the field of
# the inner one: what they are called, and the right order.
_REPLACES_UPDATES = {
    ("LookaheadState", "fast_state"): (
        "optax.lookahead",
        "optax.chain(optax.lookahead(...), swa(config))",
    ),
    ("MechanicState", "base_optimizer_state"): (
        "optax.contrib.mechanize",
        "optax.chain(optax.contrib.mechanize(...), swa(config))",
    ),
    ("SAMState", "adv_state"): (
        "the adversarial optimizer of optax.contrib.sam",
        "optax.contrib.sam(optax.chain(..., swa(config)), adv_optimizer)",
    ),
    ("ScheduleFreeState", "base_optimizer_state"): (
        "optax.contrib.schedule_free",
        "optax.chain(optax.contrib.schedule_free(...), swa(config))",
    ),
}


def find_state(opt_state: Tree) -> SWAState:
    """The one ``SWAState`` in an optimizer state of any nesting.

    Raises:
      StateError: there is none, or there are several, or a chain goes on behind it.

    >>> find_state(((), {"inner": SWAState(1, 0, 0, 0.0, None)})).n_updates
    1
    """
    found = {
        path: part
        for path, part in jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)[0]
        if is_state(part)
    }
    if not found:
        raise StateError(
            "the optimizer state holds no average.",
            hint=restore_hint(opt_state)
            or "put swa_optax.swa(config) last in the chain, and pass the state of the whole "
            "optimizer (tx.init, tx.update).",
        )
    if len(found) > 1:
        places = ", ".join("opt_state" + "".join(map(str, path)) for path in found)
        raise StateError(
            f"the optimizer state holds {len(found)} averages: {places}.",
            hint="pass the part of the state that holds the one you mean, or put one swa at the "
            "end of the outermost chain instead of one in each part.",
        )
    (path,) = found
    _refuse_followed(opt_state, path)
    state = found[path]
    # The state of an nnx.Optimizer has each of its arrays in a variable; ``leaves`` unpacks those
    # of the average.
    return SWAState(*map(value, state[:-1]), average=state.average)


def _refuse_followed(opt_state: Tree, path: tuple[Any, ...]) -> None:
    """Raises ``StateError`` if something changes the updates behind the average.

    It was made with updates that were not those of the training, and so is one of weights that
    never were. The transformation cannot know; the states of chains and wrappers tell.
    """
    part, place = opt_state, "opt_state"
    for step in path:
        last = _last(part)
        if last is not None and step != last:
            raise StateError(
                f"swa is not last in its chain: {place}{step} holds the average, of "
                f"{len(part)} parts, and what comes after it changes the updates that it averaged "
                "with. The average is not one of weights that the training had.",
                hint="make it optax.chain(..., swa(config)). If this tuple is no chain, pass the "
                "optimizer state in it that holds the average.",
            )
        kind = type(part).__name__, getattr(step, "name", None)
        if kind in _REPLACES_UPDATES:
            wrapper, right = _REPLACES_UPDATES[kind]
            raise StateError(
                f"swa is inside of {wrapper}: {place}{step} holds the average, and the wrapper "
                "makes other updates out of those that it averaged with. The average is not one "
                "of weights that the training had.",
                hint=f"make it {right}.",
            )
        place += str(step)
        part = _child(part, step)


def _last(part: Any) -> Any:
    """The way to the last state of a chain, or None if ``part`` is that of no chain."""
    if type(part) is tuple:
        return jax.tree_util.SequenceKey(len(part) - 1)
    if type(part) is OrderedDict:  # of a named_chain
        return jax.tree_util.DictKey(next(reversed(part)))
    return None


def _child(part: Any, step: Any) -> Any:
    # By JAX itself: a container of one's own need not have its children as items or attributes.
    children, _ = jax.tree_util.tree_flatten_with_path(part, is_leaf=lambda node: node is not part)
    return next(child for path, child in children if path[0] == step)
