"""The averaging as a gradient transformation for the end of a chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from swa_core import Rule, StructureError, SWAState
from swa_core.averaging import check_leaves
from swa_optax import reading
from swa_optax.counting import counter, increment
from swa_optax.paths import Path, Tree, abstract, average_dtype, is_averaged, leaves
from swa_optax.resolving import Config, resolve

Leaves = list[jax.Array]


def swa(
    config: Config,
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters that the updates of a chain lead to.

    At every snapshot :math:`\bar\theta_n = \bar\theta_{n-1} + a_n (\theta - \bar\theta_{n-1})`,
    where :math:`\theta` is ``optax.apply_updates(params, updates)`` and :math:`a_1 = 1`. The
    updates pass through unchanged, so the training is the one without averaging.

    It belongs at the very end of a chain, inside of what decides whether an update happens:
    ``MultiSteps(chain(opt, swa(...)), 4)`` and ``apply_if_finite(chain(opt, swa(...)), 5)`` count
    the updates that are made; the other way round they would count micro-steps and refused
    updates. A transformation cannot see what comes after it: before ``scale`` or an optimizer it
    would average weights that never were. What reads the average from the state of such a chain
    refuses it.

    Args:
      config: a ``SWAConfig``, a mapping, or the path of a file with a ``[swa]`` table. Of
        ``[swa.lr]`` nothing is done here; see ``swa_lr``.
      steps_per_epoch: updates per epoch, where the configuration counts epochs.
      total_steps: updates in all, where it has a share of the training.

    Returns:
      A transformation with the state ``swa_core.SWAState``: int32 counters ``n_updates``,
      ``n_averaged`` and ``n_skipped`` that stop at 2**31 - 1, ``total`` in float32, and
      ``average`` in float32 (float64 for float64 parameters). Leaves that are not averaged
      (integers, booleans, keys) are None in ``average``; give ``is_leaf=lambda x: x is None`` to
      tree functions that take ``average`` beside the parameters. Above 2**24 snapshots their
      number is rounded to float32 where it weighs the next. ``update`` raises a ``StructureError``
      without ``params``, and when their structure, shapes or dtypes are not those of the average
      (when traced, before anything is computed).

    Raises:
      ConfigError: faults in the configuration; a length is missing, or traced.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1.

    >>> tx = optax.chain(optax.sgd(1.0), swa({"start": "2step", "every": "1step"}))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> reading.averaged_params(state, params)["w"]
    Array([2.5, 2.5], dtype=float32)
    """
    config, schedule = resolve(config, steps_per_epoch, total_steps)
    # Made once: eager lax.cond recognises the branches it has compiled by their identity.
    mix = partial(_mixed, config.rule)

    def init(params: Tree) -> SWAState:
        reading.expect_a_first_snapshot()
        return SWAState(
            n_updates=counter(),
            n_averaged=counter(),
            n_skipped=counter(),
            total=jnp.zeros((), jnp.float32),
            average=jax.tree.map(_initial, params),
        )

    def update(
        updates: Tree, state: SWAState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, SWAState]:
        del extra_args  # for other transformations of the chain
        new = _parameters_after(updates, state, params)
        old, structure = jax.tree.flatten(state.average)
        count = increment(state.n_updates)
        taken = due = schedule.is_snapshot(count)
        if config.nonfinite == "skip":
            taken = due & lax.cond(due, _all_finite, _not_read, new)
        n = increment(state.n_averaged)
        mixed = lax.cond(taken, mix, _kept, old, new, n)
        total = 1.0 / _mixing_weight(config.rule, n, jnp.float32)
        return updates, SWAState(
            n_updates=count,
            n_averaged=jnp.where(taken, n, state.n_averaged),
            n_skipped=jnp.where(due & ~taken, increment(state.n_skipped), state.n_skipped),
            total=jnp.where(taken, total, state.total),
            average=jax.tree.unflatten(structure, mixed),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(leaf: Any) -> jax.Array | None:
    if not is_averaged(leaf):
        return None
    if isinstance(leaf, jax.ShapeDtypeStruct):  # abstract init, as optax' own transformations do it
        return jnp.zeros_like(leaf, dtype=average_dtype(leaf))
    # astype would return the very buffer of a parameter of this dtype; donating both would fail.
    return jnp.array(leaf, dtype=average_dtype(leaf), copy=True)


def _parameters_after(updates: Tree, state: SWAState, params: Tree) -> Leaves:
    """The averaged leaves of the new parameters, in the order of the average's leaves."""
    if params is None:
        raise StructureError(
            "cannot average: swa was updated without the parameters.",
            hint="call tx.update(grads, state, params), and put swa last in the chain.",
        )
    average, live = leaves(state.average), leaves(params)
    check_leaves(
        _described(average),
        _described(live),
        "cannot average the parameters",
        "init and every update need the same parameters. If the model changed on purpose, start "
        "a new average: call init again.",
    )
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


def _described(found: dict[Path, Any]) -> dict[Any, jax.ShapeDtypeStruct]:
    described = {path: abstract(leaf) for path, leaf in found.items()}
    # numpy, and so the core, does not know the dtype of a PRNG key.
    return {path: leaf for path, leaf in described.items() if isinstance(leaf.dtype, np.dtype)}


def _mixed(rule: Rule, old: Leaves, new: Leaves, n: jax.Array) -> Leaves:
    """The average with the n-th snapshot in it."""

    def mix(average: jax.Array, leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(average.dtype)
        weight = _mixing_weight(rule, n, jnp.finfo(average.dtype).dtype).astype(average.dtype)
        # The first snapshot is selected: mixing it in by weight 1 would lose its last bits, and
        # turn -0.0 into 0.0.
        return jnp.where(n == 1, wide, average + weight * (wide - average))

    return [mix(average, leaf) for average, leaf in zip(old, new, strict=True)]


def _kept(old: Leaves, new: Leaves, n: jax.Array) -> Leaves:
    return old


def _mixing_weight(rule: Rule, n: jax.Array, dtype: Any) -> jax.Array:
    # Not by the recurrence of ``total``, which drifts in float32.
    weight: Callable[..., jax.Array] = rule.mixing_weight
    return weight(n.astype(dtype), expm1=jnp.expm1)


def _all_finite(new: Leaves) -> jax.Array:
    finite = jnp.array(True)
    for leaf in new:
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            # The maximum of NaN is NaN, and it is found in one pass; all(isfinite(...)) writes
            # its booleans to memory and takes twice as long.
            size = jnp.abs(part.astype(average_dtype(part)))
            finite &= jnp.isfinite(jnp.max(size, initial=0))
    return finite


def _not_read(new: Leaves) -> jax.Array:
    return jnp.array(False)
