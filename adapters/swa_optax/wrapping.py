"""An optimizer and the average of the parameters it trains, as one transformation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from swa_core import SWAState
from swa_optax import accumulating
from swa_optax.checking import is_state, refuse_state
from swa_optax.memory import MemoryKind, check_memory_kind
from swa_optax.paths import Tree
from swa_optax.resolving import Config, resolve
from swa_optax.transform import advancing


def wrap(
    inner: optax.GradientTransformation | optax.MultiSteps,
    config: Config,
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
    memory_kind: MemoryKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer ``inner`` with an average of the parameters that its updates lead to.

    As ``optax.chain(inner, swa(config, ...))``, whose state it has, but for the order, which
    cannot be wrong: where ``inner`` is ``MultiSteps``, ``apply_if_finite`` or ``contrib.sam``, or a
    chain with one of them in it, an update counts when it is made, not at every micro-step. (Inside
    of a partition or a mask they decide about a part of the parameters alone, and every call
    counts, as it does with ``apply_every``, ``conditionally_mask`` and ``conditionally_transform``
    and inside of ``schedule_free``, whose states do not tell.)
    What comes behind the wrapper in a chain of its own is refused where the average is read.

    Args:
      inner: the whole optimizer.
      config: as for ``swa``.
      steps_per_epoch: updates per epoch, where the configuration counts epochs; with
        ``MultiSteps``, batches divided by its ``every_k_schedule``.
      total_steps: updates in all, where it has a share of the training.
      memory_kind: as for ``swa``.

    Returns:
      A transformation; its state is the pair of the state of ``inner`` and a ``SWAState``.

    Raises:
      ConfigError: faults in the configuration; a length is missing, or traced.
      TypeError: ``inner`` is no optimizer.
      ValueError: another ``memory_kind``.

    >>> tx = wrap(optax.MultiSteps(optax.sgd(1.0), 2), {"start": "1step", "every": "1step"})
    >>> params = {"w": jnp.zeros(1)}
    >>> state = tx.init(params)
    >>> for _ in range(6):
    ...     updates, state = tx.update({"w": -jnp.ones(1)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], state[1].average["w"], int(state[1].n_updates)
    (Array([3.], dtype=float32), Array([2.], dtype=float32), 3)
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax optimizer, got {type(inner).__name__}; with an optimizer and "
            "a configuration it is wrap(optimizer, config)"
        )
    config, schedule = resolve(config, steps_per_epoch, total_steps)
    check_memory_kind(memory_kind)
    advance = advancing(config, schedule)
    optimizer = optax.with_extra_args_support(inner)

    def init(params: Tree) -> tuple[Tree, SWAState]:
        return optimizer.init(params), accumulating.init(params, memory_kind=memory_kind)

    def update(
        updates: Tree, state: tuple[Tree, SWAState], params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, tuple[Tree, SWAState]]:
        if type(state) is not tuple or len(state) != 2 or not is_state(state[1]):
            refuse_state(state, "state of wrap")
        before, average = state
        updates, after = optimizer.update(updates, before, params, **extra_args)
        made = _made(before, after, updates)
        return updates, (after, advance(updates, average, params, made))

    return optax.GradientTransformationExtraArgs(init, update)


def _made(before: Tree, after: Tree, updates: Tree) -> jax.Array | None:
    """Whether all that decides about the whole update has let it pass; None if nothing decides."""
    made = None
    for old, new in _gates(before, after):
        if isinstance(new, optax.MultiStepsState):
            passed = new.gradient_step != old.gradient_step
        elif isinstance(new, optax.contrib.SAMState):
            passed = new.steps_since_sync == 0  # elsewhere the adversary is on its way
        else:
            # Bad updates pass after too many in a row, and are no zeros then.
            passed = lax.cond(new.last_finite, _finite, _any_change, new.last_finite, updates)
        made = passed if made is None else made & passed
    return made


def _gates(before: Tree, after: Tree) -> Iterator[tuple[Any, Any]]:
    """The states before and after of whatever decides whether the whole update is made."""
    if type(after) is tuple:  # of a chain
        for old, new in zip(before, after, strict=True):
            yield from _gates(old, new)
    elif isinstance(after, dict):  # of a named chain
        for name, new in after.items():
            yield from _gates(before[name], new)
    elif isinstance(after, optax.MultiStepsState):
        yield before, after
        yield from _gates(before.inner_opt_state, after.inner_opt_state)
    elif isinstance(after, optax.ApplyIfFiniteState):
        yield before, after
        yield from _gates(before.inner_state, after.inner_state)
    elif isinstance(after, optax.contrib.SAMState):
        yield before, after
        yield from _gates(before.opt_state, after.opt_state)
    elif isinstance(after, _PASSING_ON):
        yield from _gates(before.inner_state, after.inner_state)


# The states of what makes no decision of its own, around an inner optimizer.
_PASSING_ON = (
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
    optax.contrib.SplitRealAndImaginaryState,
)


def _finite(last_finite: jax.Array, updates: Tree) -> jax.Array:
    # No constant: inside of shard_map it differs between the shards as the updates do.
    return last_finite


def _any_change(last_finite: jax.Array, updates: Tree) -> jax.Array:
    changed = last_finite
    for leaf in jax.tree.leaves(updates):
        changed |= jnp.any(leaf != 0)
    return changed
