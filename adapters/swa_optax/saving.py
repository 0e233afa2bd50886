"""The state of the averaging alone as a plain dictionary of numpy arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from swa_core import Rule, Schedule, StateError, SWAState
from swa_core.averaging import check_leaves
from swa_core.saving import header, read_header
from swa_optax.checking import expect_state, is_state, refuse_tracing
from swa_optax.finding import find_state
from swa_optax.paths import Tree, leaves
from swa_optax.placing import fetched, placed_like
from swa_optax.reading import refuse_ensemble
from swa_optax.resolving import LAST_UPDATE


def state_to_dict(
    opt_state: Tree, *, schedule: Schedule | None = None, rule: Rule | None = None
) -> dict[str, Any]:
    """The average as a plain dictionary: version, counters, and numpy arrays by path.

    The same form as ``swa_core.state_to_dict``. A whole optimizer state can as well be saved as
    any other (``flax.serialization``, Orbax, pickle); but arrays are all it holds, so that only
    this form can tell on loading whether schedule and rule are still the same.

    Args:
      opt_state: the state of an optimizer with ``swa`` in it, of any nesting. Arrays on the devices
        of several processes are gathered whole in each: all of them have to call this.
      schedule: saved too (``config.schedule(...)``), so that loading into another one is refused.
      rule: likewise (``config.rule``).

    Raises:
      StateError: the state holds no average, or several; or two leaves have the same path.

    >>> import jax.numpy as jnp
    >>> state_to_dict(SWAState(7, 2, 0, 2.0, {"w": jnp.zeros(1)}))["average"]
    {'w': array([0.], dtype=float32)}
    """
    state = find_state(opt_state)
    refuse_ensemble(state)
    refuse_tracing(state, "a state cannot be saved")
    state = expect_state(state, "a state cannot be saved")
    return {**header(state, schedule, rule), "average": _by_name(state.average)}


def state_from_dict(
    saved: Mapping[str, Any],
    opt_state: Tree,
    *,
    schedule: Schedule | None = None,
    rule: Rule | None = None,
) -> Tree:
    """An optimizer state with the saved average in the place of its own.

    Args:
      saved: what ``state_to_dict`` returned.
      opt_state: the optimizer state of the training that goes on (of ``tx.init(params)``).
      schedule: of this training; checked if both sides know theirs.
      rule: likewise.

    Returns:
      The optimizer state; arrays lie on the devices where those of ``opt_state`` lie.

    Raises:
      StateError: truncated, damaged, newer, or of another schedule or rule.
      StructureError: of other parameters.

    >>> import jax.numpy as jnp
    >>> saved = state_to_dict(SWAState(7, 2, 0, 2.0, {"w": jnp.ones(1)}))
    >>> empty = SWAState(0, 0, 0, 0.0, {"w": jnp.zeros(1)})
    >>> state_from_dict(saved, empty).average
    {'w': Array([1.], dtype=float32)}
    """
    now = find_state(opt_state)
    refuse_ensemble(now)
    counters = read_header(saved, schedule, rule)
    if not isinstance(saved.get("average"), Mapping):
        raise StateError(
            "the saved average is truncated: its arrays are missing.",
            hint="load an earlier checkpoint.",
        )
    held = {path: np.asarray(leaf) for path, leaf in saved["average"].items()}
    hint = "load it into the model it was saved with."
    check_leaves(held, named(now.average), "cannot load the saved average", hint)
    return restored(opt_state, now, SWAState(**counters, average=held))


def restored(opt_state: Tree, now: SWAState, found: SWAState) -> Tree:
    """An optimizer state with one average in the place of another.

    Args:
      opt_state: of any nesting.
      now: the average in it.
      found: what comes in its place: Python's counters, and arrays by path.
    """
    own = named(now.average)
    average = [placed_like(found.average[path], own[path]) for path in own]
    # In numpy, for inside of jit JAX has no numbers.
    counts = [*(np.int32(min(n, LAST_UPDATE)) for n in found[:3]), np.float32(found.total)]
    # Where those lie that they replace: a compiled step that took them takes these.
    counters = map(placed_like, counts, jax.tree.leaves(now[:4]), [c.dtype for c in counts])
    arrays = [*counters, *average]

    def restore(part: Any) -> Any:
        # By its structure, which in an nnx.Optimizer has variables around the arrays.
        return jax.tree.unflatten(jax.tree.structure(part), arrays) if is_state(part) else part

    return jax.tree.map(restore, opt_state, is_leaf=is_state)


def _by_name(average: Tree) -> dict[str, Any]:
    return {path: fetched(leaf) for path, leaf in named(average).items()}


def named(average: Tree) -> dict[str, Any]:
    """The leaves of an average by printed path, which must tell them apart."""
    named: dict[str, Any] = {}
    for path, leaf in leaves(average).items():
        if str(path) in named:
            raise StateError(
                f"two leaves have the path '{path}', so they cannot be saved apart.",
                hint="use keys without '/', or save the optimizer state itself.",
            )
        named[str(path)] = leaf
    return named
