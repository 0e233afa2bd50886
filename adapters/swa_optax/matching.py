"""The leaves that join an average, held against those it holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_core import StructureError, SWAState
from swa_core.averaging import check_leaves
from swa_optax.mixing import Leaves
from swa_optax.paths import Path, Tree, abstract, leaves


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
    average, live = _matched(state, params)
    changes = leaves(updates)
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


def _described(found: dict[Path, Any]) -> dict[Any, jax.ShapeDtypeStruct]:
    described = {path: abstract(leaf) for path, leaf in found.items()}
    # numpy, and so the core, does not know the dtype of a PRNG key.
    return {path: leaf for path, leaf in described.items() if isinstance(leaf.dtype, np.dtype)}
