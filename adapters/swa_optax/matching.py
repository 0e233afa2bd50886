"""The leaves that join an average, held against those it holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_core import StructureError, SWAState
from swa_core.averaging import check_leaves
from swa_optax.checking import expect_parameters
from swa_optax.mixing import Leaves
from swa_optax.paths import Path, Tree, abstract, is_array, leaves


def parameters_after(updates: Tree, state: SWAState, params: Tree) -> Leaves:
    """The averaged leaves of the parameters that the updates lead to, in the average's order.

    Raises:
      StructureError: no parameters, or others than ``state`` was made for.
    """
    if params is None:
        raise StructureError(
            "cannot average: swa was updated without the parameters.",
            hint="call tx.update(grads, state, params), and put swa last in the chain.",
        )
    expect_parameters(params, "tx.update(grads, state, params)")
    average, live = _matched(state, params)
    changes = leaves(updates)
    _expect_updates_of(average, live, updates)
    for path in average:
        if path in changes and jnp.shape(changes[path]) != jnp.shape(live[path]):
            raise StructureError(
                f"cannot average the parameters: leaf '{path}' has shape {jnp.shape(live[path])}, "
                f"but its update has {jnp.shape(changes[path])}.",
                hint="put swa last in the chain, where updates are those of apply_updates.",
            )
    # apply_updates is called outside of the condition, where the compiler shares it with the
    # caller's own: the snapshot is the very array that the training goes on with. A leaf whose
    # update is None (a frozen one, in Equinox) stays what it is.
    changed = [path for path in average if path in changes]
    applied = optax.apply_updates([live[path] for path in changed], [changes[p] for p in changed])
    after = live | dict(zip(changed, applied, strict=True))
    return [jnp.asarray(after[path]) for path in average]


def parameters_now(state: SWAState, params: Tree) -> Leaves:
    """The averaged leaves of the parameters as they are, in the average's order.

    Raises:
      StructureError: other parameters than ``state`` was made for.
    """
    average, live = _matched(state, params)
    return [jnp.asarray(live[path]) for path in average]


def _matched(state: SWAState, params: Tree) -> tuple[dict[Path, Any], dict[Path, Any]]:
    average, live = leaves(state.average), leaves(params)
    check_leaves(
        _described(average),
        _described(live),
        "cannot average the parameters",
        "init and every update need the same parameters. If the model changed on purpose, start "
        "a new average: call init again.",
    )
    return average, live


def _expect_updates_of(average: dict[Path, Any], live: dict[Path, Any], updates: Tree) -> None:
    """Raises ``StructureError`` for updates of other leaves than the parameters have.

    None and ``MaskedNode`` stand for updates that are not made.
    """
    hint = "updates need the structure of the parameters, with None for what is not updated."
    changes = leaves(updates)
    for path in changes:
        if path not in live:
            raise StructureError(
                f"cannot average the parameters: there is an update of leaf '{path}', which they "
                "do not have.",
                hint=hint,
            )
    without = [path for path in average if path not in changes]
    found = leaves(updates, is_leaf=_is_no_update) if without else {}
    not_made = {path for path, leaf in found.items() if _is_no_update(leaf)}
    for path in without:
        if not any(path[:n] in not_made for n in range(len(path) + 1)):
            raise StructureError(
                f"cannot average the parameters: there is no update of leaf '{path}'.", hint=hint
            )


def _is_no_update(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _described(found: dict[Path, Any]) -> dict[Any, jax.ShapeDtypeStruct]:
    described = {path: abstract(leaf) for path, leaf in found.items() if is_array(leaf)}
    # numpy, and so the core, does not know the dtype of a PRNG key.
    return {path: leaf for path, leaf in described.items() if isinstance(leaf.dtype, np.dtype)}
