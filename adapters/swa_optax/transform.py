"""The averaging as a gradient transformation for the end of a chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from swa_core import Schedule, SWAConfig, SWAState
from swa_optax import accumulating
from swa_optax.agreeing import looking, not_read
from swa_optax.checking import expect_state
from swa_optax.counting import increment
from swa_optax.matching import parameters_after
from swa_optax.memory import MemoryKind, check_memory_kind
from swa_optax.mixing import kept, mixed, total_after
from swa_optax.paths import Tree
from swa_optax.resolving import LAST_UPDATE, Config, resolve

# The state after an update: (updates, state, params, made) -> state.
Advance = Callable[[Tree, SWAState, Tree, jax.Array | None], SWAState]


def swa(
    config: Config,
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
    memory_kind: MemoryKind | None = None,
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
      memory_kind: "pinned_host" keeps the average in the memory of the host, and moves it to the
        device and back at every snapshot; by default it lies with the parameters. Put the
        parameters on a device first (``jax.device_put``), and call ``jax.jit(tx.init)``: such an
        average is committed to its place, the results of a step with it are too, and a step
        whose first inputs were not is compiled a second time.

    Returns:
      A transformation with the state ``swa_core.SWAState``: int32 counters ``n_updates``,
      ``n_averaged`` and ``n_skipped`` that stop at 2**31 - 1, ``total`` in float32, and
      ``average`` in float32 (float64 for float64 parameters). Leaves that are not averaged
      (integers, booleans, keys) are None in ``average``; give ``is_leaf=lambda x: x is None`` to
      tree functions that take ``average`` beside the parameters. Above 2**24 snapshots their
      number is rounded to float32 where it weighs the next. ``update`` raises a ``StructureError``
      without ``params``, and when their structure, shapes or dtypes are not those of the average,
      and a ``StateError`` for a state that is another's, was cast or restored without its
      structure (when traced, before anything is computed). ``init`` refuses parameters none of
      which can be averaged; trees without leaves pass.

    Raises:
      ConfigError: faults in the configuration; a length is missing, or traced.
      ValueError: another ``memory_kind``.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1.

    >>> from swa_optax import averaged_params
    >>> tx = optax.chain(optax.sgd(1.0), swa({"start": "2step", "every": "1step"}))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> averaged_params(state, params)["w"]
    Array([2.5, 2.5], dtype=float32)
    """
    config, schedule = resolve(config, steps_per_epoch, total_steps)
    check_memory_kind(memory_kind)
    advance = advancing(config, schedule)

    def init(params: Tree) -> SWAState:
        return accumulating.init(params, memory_kind=memory_kind)

    def update(
        updates: Tree, state: SWAState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, SWAState]:
        del extra_args  # for other transformations of the chain
        return updates, advance(updates, state, params, None)

    return optax.GradientTransformationExtraArgs(init, update)


def advancing(config: SWAConfig, schedule: Schedule) -> Advance:
    """The state of the averaging after an update, as a function of that before.

    Args:
      config: rule, and what happens to NaN and Inf.
      schedule: which updates are snapshots.

    Returns:
      A function of the updates, the state, the parameters, and whether the update is made: a
      boolean array, or None where it always is.
    """
    # Made once: eager lax.cond recognises the branches it has compiled by their identity.
    mix = partial(mixed, config.rule)

    def advance(updates: Tree, state: SWAState, params: Tree, made: jax.Array | None) -> SWAState:
        state = expect_state(state)
        new = parameters_after(updates, state, params)
        old, structure = jax.tree.flatten(state.average)
        count = increment(state.n_updates)
        # What comes after the last number is not counted, and no snapshot: all of it would be.
        due = schedule.is_snapshot(count) & (state.n_updates < LAST_UPDATE)
        if made is not None:
            count = jnp.where(made, count, state.n_updates)
            due &= made
        taken = due
        if config.nonfinite == "skip":
            taken = due & lax.cond(due, looking(), not_read, new, count)
        n = increment(state.n_averaged)
        average = lax.cond(taken, mix, kept, old, new, n)
        return SWAState(
            n_updates=count,
            n_averaged=jnp.where(taken, n, state.n_averaged),
            n_skipped=jnp.where(due & ~taken, increment(state.n_skipped), state.n_skipped),
            total=jnp.where(taken, total_after(config.rule, n), state.total),
            average=jax.tree.unflatten(structure, average),
        )

    return advance
