"""Reading the average out of the state of any optimizer that holds it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

from swa_core import NothingAveragedError, StateError, StructureError, SWAState, SWAWarning
from swa_optax.checking import (
    expect_count,
    expect_parameters,
    is_state,
    refuse_deleted,
    refuse_shapes_alone,
    restore_hint,
)
from swa_optax.layouts import as_the_parameters
from swa_optax.memory import to_device
from swa_optax.paths import Path, Tree, averaged_leaves, leaves, map_with_path
from swa_optax.variables import taken_apart, value

# Whether reading before the first snapshot has warned since the last ``init``: an evaluation in
# every epoch of a long training warns once. States are arrays only, so none can remember it.
_has_warned = False


def expect_a_first_snapshot() -> None:
    """A new training begins, which may warn once that nothing is averaged yet."""
    global _has_warned
    _has_warned = False


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


def n_averaged(opt_state: Tree) -> int | jax.Array:
    """The number of snapshots in the average.

    Args:
      opt_state: the state of an optimizer with ``swa`` in it.

    Returns:
      An int; inside of jit, and for an ensemble made by vmap, an int32 array.

    >>> n_averaged(SWAState(7, 2, 0, 2.0, None))
    2
    """
    return _count(find_state(opt_state), "n_averaged")


def n_skipped(opt_state: Tree) -> int | jax.Array:
    """The number of snapshots left out because they held NaN or Inf.

    Args:
      opt_state: the state of an optimizer with ``swa`` in it.

    Returns:
      An int; inside of jit, and for an ensemble made by vmap, an int32 array.

    >>> n_skipped(SWAState(7, 2, 1, 2.0, None))
    1
    """
    return _count(find_state(opt_state), "n_skipped")


def averaged_params(opt_state: Tree, params: Tree) -> Tree:
    """The averaged parameters, for evaluation, in the structure and dtypes of ``params``.

    Leaves that are not averaged (masked, frozen by ``optax.partition``, integers, keys) are those
    of ``params``. Before the first snapshot all are, with one warning (none inside of jit).

    Args:
      opt_state: the state of an optimizer with ``swa`` in it, of any nesting.
      params: the parameters of the training.

    Returns:
      A tree like ``params`` whose averaged leaves are copies: donating them loses no average.

    Raises:
      StateError: the state holds no average, several, or those of an ensemble.
      StructureError: the average holds leaves that ``params`` does not, other shapes, or complex
        numbers where ``params`` has real ones.

    >>> state = SWAState(7, 2, 0, 2.0, {"w": jnp.array([0.5]), "steps": None})
    >>> averaged_params(state, {"w": jnp.array([1.0]), "steps": 3})
    {'steps': 3, 'w': Array([0.5], dtype=float32)}
    """
    expect_parameters(params, "averaged_params(opt_state, params)")
    state = find_state(opt_state)
    live, put_together = taken_apart(params)
    average = _matched(state, live)
    if isinstance(state.n_averaged, jax.core.Tracer):
        return put_together(_merged(average, live, state.n_averaged > 0))
    if _number(state):
        return put_together(_merged(average, live))
    refuse_deleted(leaves(live), "cannot read the parameters")
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"nothing is averaged yet (after {state.n_updates} updates): these are the live "
            "parameters.",
            SWAWarning,
            stacklevel=2,
        )
    return put_together(live)


def finalize(opt_state: Tree, params: Tree) -> Tree:
    """The averaged parameters, to keep for good at the end of a training.

    Args:
      opt_state: the state of an optimizer with ``swa`` in it.
      params: the last parameters of the training.

    Returns:
      As ``averaged_params``.

    Raises:
      NothingAveragedError: there was no snapshot, or none without NaN or Inf.
      StateError: as ``averaged_params``, and inside of jit, where this cannot be known.
      StructureError: as ``averaged_params``.

    >>> finalize(SWAState(7, 2, 0, 2.0, {"w": jnp.array([0.5])}), {"w": jnp.array([1.0])})
    {'w': Array([0.5], dtype=float32)}
    """
    expect_parameters(params, "finalize(opt_state, params)")
    state = find_state(opt_state)
    if isinstance(state.n_averaged, jax.core.Tracer):
        raise StateError(
            "finalize() inside of jit cannot know whether anything is averaged.",
            hint="call it outside, or use averaged_params, which gives the live parameters then.",
        )
    if not _number(state):
        skipped = int(state.n_skipped)
        why = f"; {skipped} snapshots held NaN or Inf and were left out" if skipped else ""
        raise NothingAveragedError(
            f"finalize() before the first snapshot: nothing is averaged after {state.n_updates} "
            f"updates{why}.",
            hint="train past the start, or start sooner.",
        )
    live, put_together = taken_apart(params)
    return put_together(_merged(_matched(state, live), live))


def _count(state: SWAState, name: str) -> int | jax.Array:
    count = getattr(state, name)
    refuse_shapes_alone(name, count)
    expect_count(name, count)
    refuse_deleted({name: count}, "cannot read the state")
    return count if isinstance(count, jax.core.Tracer) or jnp.ndim(count) else int(count)


def _number(state: SWAState) -> int:
    """The number of snapshots, known outside of jit."""
    refuse_ensemble(state)
    return int(_count(state, "n_averaged"))


def refuse_ensemble(state: SWAState) -> None:
    """Raises ``StateError`` for the states of several trainings in one, as vmap makes them."""
    if jnp.ndim(state.n_averaged):
        raise StateError(
            f"the state is an ensemble's: n_averaged has shape {jnp.shape(state.n_averaged)}.",
            hint="map over its members: jax.vmap(averaged_params)(opt_state, params); to save it, "
            "save the optimizer state itself.",
        )


def _matched(state: SWAState, params: Tree) -> dict[Path, Any]:
    """The leaves of the average by path, if the parameters have them all."""
    average = as_the_parameters(leaves(state.average), params)
    live = averaged_leaves(params)
    refuse_deleted(average, "cannot read the average")
    hint = "pass the parameters of this training, whole."
    for path, leaf in average.items():
        if path not in live:
            raise StructureError(
                f"cannot read the average: the parameters have no floating-point leaf '{path}'.",
                hint=hint,
            )
        if jnp.shape(leaf) != jnp.shape(live[path]):
            raise StructureError(
                f"cannot read the average: leaf '{path}' has shape {jnp.shape(live[path])}, but "
                f"the running average holds {jnp.shape(leaf)}.",
                hint=hint,
            )
        if jnp.iscomplexobj(leaf) and not jnp.issubdtype(
            jnp.result_type(live[path]), jnp.complexfloating
        ):
            raise StructureError(
                f"cannot read the average: leaf '{path}' is {jnp.result_type(live[path])}, but the "
                f"running average holds {jnp.result_type(leaf)}.",
                hint=hint,
            )
    return average


def _merged(average: dict[Path, Any], params: Tree, any_yet: jax.Array | None = None) -> Tree:
    """``params`` with the averaged leaves in their places, where there are ``any_yet``."""
    kept = {path: leaf for path, leaf in leaves(params).items() if path not in average}
    refuse_deleted(kept, "cannot read the parameters")

    def read(path: Path, leaf: Any) -> Any:
        if path not in average:
            return leaf
        held = to_device(average[path])
        mean = jnp.array(held, dtype=jnp.result_type(leaf), copy=True)
        return mean if any_yet is None else jnp.where(any_yet, mean, leaf)

    return map_with_path(read, params)
