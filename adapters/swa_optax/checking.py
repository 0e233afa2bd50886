"""What is no state of the averaging, and what are no parameters: said before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from swa_core import StateError, StructureError, SWAState
from swa_core.trees import accumulator_dtype
from swa_optax.counting import counted
from swa_optax.paths import Tree, is_array, is_averaged, leaves
from swa_optax.variables import is_variable

_CAST = (
    "a cast of the whole optimizer state (optax.tree.cast), or a restore into a target of other "
    "dtypes, does this. Restore into what tx.init(params) returns, and cast what averaged_params "
    "returns."
)


def is_state(part: Any) -> bool:
    """Whether a part of an optimizer state is the one of ``swa``."""
    return isinstance(part, SWAState)


def holds_state(tree: Tree) -> bool:
    """Whether the state of ``swa`` is somewhere in a tree.

    >>> holds_state([SWAState(0, 0, 0, 0.0, None)]), holds_state({"w": 1})
    (True, False)
    """
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def expect_state(state: Any, what: str = "cannot average") -> SWAState:
    """The state that an update goes on with, its counters in int32 whatever a file made of them.

    Args:
      state: what was given.
      what: what cannot be done with another, the beginning of the message.

    Raises:
      StateError: it is another's, was restored without a target, cast, or is an ensemble's.

    >>> expect_state(SWAState(7, 2, 0, 2.0, None)).n_averaged
    Array(2, dtype=int32)
    """
    if not is_state(state):
        refuse_state(state, "SWAState", what)
    counts = {name: getattr(state, name) for name in state._fields[:3]}
    for name, count in counts.items():
        refuse_shapes_alone(name, count)
        expect_count(name, count)
        if jnp.ndim(count):
            raise StateError(
                f"{what}: the state is an ensemble's: {name} has shape {jnp.shape(count)}.",
                hint="map over its members: jax.vmap(tx.update)(grads, state, params).",
            )
    for path, leaf in leaves(state.average).items():
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact) or accumulator_dtype(dtype) != dtype:
            raise StateError(
                f"{what}: leaf '{path}' of the average has dtype {dtype}, and averages are "
                "kept in float32 or wider.",
                hint=_CAST,
            )
    refuse_deleted(state._asdict() | leaves(state.average), what)
    return SWAState(
        *map(counted, counts.values()), jnp.asarray(state.total, jnp.float32), state.average
    )


def refuse_state(state: Any, own: str, what: str = "cannot average") -> NoReturn:
    """Raises ``StateError`` for the state of another transformation.

    Args:
      state: what was given.
      own: the name of what it should be.
      what: what cannot be done, the beginning of the message.
    """
    raise StateError(
        f"{what}: the state is no {own}, but a {type(state).__name__}.",
        hint=restore_hint(state)
        or "call tx.update(grads, state, params) with the state that init, or the last update, of "
        "this very optimizer returned.",
    )


def expect_count(name: str, count: Any) -> None:
    """Raises ``StateError`` if a counter of a state is no whole number."""
    dtype = jnp.result_type(count)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise StateError(
            f"the state was cast: {name} has dtype {dtype}, and counts in int32. What it counted "
            "may be lost (bfloat16 has no 257).",
            hint=_CAST,
        )


def restore_hint(opt_state: Any) -> str | None:
    """What to do if an optimizer state holds the average as a plain dictionary, or None.

    That is what Orbax and msgpack give back without being told the structure.

    >>> restore_hint({"opt": {"w": 1}}) is None
    True
    """
    fields = set(SWAState._fields)

    def is_plain(part: Any) -> bool:
        return isinstance(part, Mapping) and fields <= part.keys()

    found = [part for part in jax.tree.leaves(opt_state, is_leaf=is_plain) if is_plain(part)]
    if not found:
        return None
    if is_variable(found[0]["n_updates"]):
        return "nnx.split took it apart; pass what nnx.merge(graphdef, state) makes of it."
    if "version" in found[0]:
        return "state_to_dict made it; state_from_dict(saved, tx.init(params)) makes a state of it."
    return (
        "it was restored without its structure: an average is there as a dictionary. Restore into "
        "what tx.init(params) returns (Orbax: restore(path, target); flax: from_bytes(target, "
        "data)). To read the average alone, make that dictionary a state: SWAState(**dictionary)."
    )


def expect_parameters(params: Tree, call: str) -> None:
    """Raises ``StructureError`` if an optimizer state is given where parameters are due.

    Args:
      params: what was given.
      call: the call as it should be.
    """
    if holds_state(params):
        raise StructureError(
            "an optimizer state was given in the place of the parameters.",
            hint=f"the order is {call}.",
        )


def expect_something_to_average(params: Tree) -> None:
    """Raises ``StructureError`` if there are leaves, and none that can be averaged.

    A tree without leaves passes: ``masked`` and ``partition`` make such.
    """
    found = leaves(params)
    if not found or any(map(is_averaged, found.values())):
        return
    kinds = [
        f"'{path}' is {jnp.result_type(leaf) if is_array(leaf) else type(leaf).__name__}"
        for path, leaf in found.items()
    ]
    some = ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else "")
    raise StructureError(
        f"nothing can be averaged: none of the parameters is a floating-point array ({some}).",
        hint="give init the parameters of the model, or leave swa out here.",
    )


def refuse_deleted(found: Mapping[Any, Any], what: str) -> None:
    """Raises ``StateError`` if arrays were donated to a compiled function, naming the first.

    Args:
      found: arrays by what they are called.
      what: what cannot be done, the beginning of the message.
    """
    for name, leaf in found.items():
        # A traced array has no buffer.
        if (
            isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
            and leaf.is_deleted()
        ):
            raise StateError(
                f"{what}: the buffer of '{name}' is deleted.",
                hint="a compiled function it was donated to (donate_argnums) has taken it. Go on "
                "with what that function returned, or copy before: jax.tree.map(jnp.copy, tree).",
            )


def refuse_shapes_alone(name: str, count: Any) -> None:
    """Raises ``StateError`` for a state that was only described, not made."""
    if isinstance(count, jax.ShapeDtypeStruct):
        raise StateError(
            f"the state holds shapes and no numbers: {name} is a ShapeDtypeStruct.",
            hint="jax.eval_shape made it; call tx.init(params), or read inside of eval_shape.",
        )


def refuse_tracing(state: SWAState, what: str) -> None:
    """Raises ``StateError`` inside of jit, for what works on the host alone."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
        raise StateError(
            f"{what} inside of jit: the numbers are not there yet.",
            hint="return the state from the compiled function, and save what it returned.",
        )
