"""Reading the average out of the state of any optimizer that holds it."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from swa_core import NothingAveragedError, StateError, StructureError, SWAState, SWAWarning
from swa_optax.checking import (
    expect_count,
    expect_parameters,
    refuse_deleted,
    refuse_shapes_alone,
)
from swa_optax.finding import find_state
from swa_optax.layouts import as_the_parameters
from swa_optax.memory import to_device
from swa_optax.paths import Path, Tree, averaged_leaves, leaves, map_with_path
from swa_optax.variables import taken_apart

# Whether reading before the first snapshot has warned since the last ``init``: an evaluation in
# every epoch of a long training warns once. States are arrays only, so none can remember it.
_has_warned = False


def expect_a_first_snapshot() -> None:
    """A new training begins, which may warn once that nothing is averaged yet."""
    global _has_warned
    _has_warned = False


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
      Before the first snapshot, the parameters themselves.

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
