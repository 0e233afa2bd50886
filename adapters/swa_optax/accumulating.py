"""Averaging without a transformation, for whoever keeps a training state of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from swa_core import Rule, StateError, StructureError, SWAConfig, SWAState, Uniform
from swa_optax import reading
from swa_optax.agreeing import finite_everywhere
from swa_optax.checking import (
    expect_parameters,
    expect_something_to_average,
    expect_state,
    refuse_deleted,
    refuse_shapes_alone,
)
from swa_optax.counting import counter, increment
from swa_optax.finding import find_state
from swa_optax.matching import parameters_now
from swa_optax.memory import MemoryKind, check_memory_kind, to_host
from swa_optax.mixing import Leaves, mixed, total_after
from swa_optax.paths import Tree, average_dtype, is_averaged, leaves
from swa_optax.variables import is_model

_UNIFORM = Uniform()


def init(params: Tree, *, memory_kind: MemoryKind | None = None) -> SWAState:
    """The state before the first update. Copies: the average shares no memory with ``params``.

    Args:
      params: the parameters, or ``jax.ShapeDtypeStruct`` in their places (the average is then
        zeros of their shapes). Every leaf keeps its ``NamedSharding``, under jit too.
      memory_kind: "pinned_host" keeps the average in the memory of the host; by default it lies
        with the parameters.

    Returns:
      As ``swa``'s.

    Raises:
      StructureError: there are leaves, and none that can be averaged, or one that is no array; a
        model of nnx, and not its parameters.
      StateError: a parameter's buffer was donated.
      ValueError: another memory.

    >>> init({"w": jnp.ones(2, jnp.bfloat16), "steps": 3}).average
    {'steps': None, 'w': Array([1., 1.], dtype=float32)}
    """
    check_memory_kind(memory_kind)
    expect_parameters(params, "init(params)")
    if is_model(params):
        raise StructureError(
            "cannot average a whole model of nnx: statistics and counters are no parameters.",
            hint="give its parameters: nnx.state(model, nnx.Param).",
        )
    expect_something_to_average(params)
    refuse_deleted(leaves(params), "cannot start an average")
    reading.expect_a_first_snapshot()

    def copy(leaf: Any) -> jax.Array | None:
        if not is_averaged(leaf):
            return None
        if isinstance(leaf, jax.ShapeDtypeStruct):  # as optax' own transformations do it
            return jnp.zeros_like(leaf, dtype=average_dtype(leaf))
        # astype would return the very buffer of a parameter of this dtype; donating both would
        # fail.
        array = jnp.array(leaf, dtype=average_dtype(leaf), copy=True)
        return array if memory_kind is None else to_host(array)

    return SWAState(
        n_updates=counter(),
        n_averaged=counter(),
        n_skipped=counter(),
        total=jnp.zeros((), jnp.float32),
        average=jax.tree.map(copy, params),
    )


def accumulate(
    state: SWAState,
    params: Tree,
    *,
    rule: Rule | str | Mapping[str, Any] = _UNIFORM,
    nonfinite: Literal["skip", "keep"] = "skip",
) -> SWAState:
    """The state with one more snapshot in it: that of ``params``, whenever you call it.

    For loops with a train state of their own, which know when a snapshot is due. Compiled once
    for parameters of one kind (of sharded ones, if ``jax.jit(init)`` made the state); ``state`` is
    donated: use what is returned.

    Args:
      state: of ``init(params)``, or of an earlier call.
      params: the parameters, of the structure that ``init`` was given; they are only read.
      rule: how much each snapshot weighs, as in the configuration: a ``Rule``, "uniform", or
        ``{"name": "ema", "decay": 0.999}``. The same at every call.
      nonfinite: "skip" leaves out a snapshot with NaN or Inf and counts it, which reads ``params``
        once more; "keep" does not look.

    Returns:
      The new state, with ``n_updates`` counting the calls; ``averaged_params``, ``finalize`` and
      what saves a state take it as they take an optimizer's.

    Raises:
      StateError: ``state`` holds no average, was cast, or donated already.
      StructureError: other parameters than ``init`` was given.
      ConfigError: no such rule.
      TypeError: ``rule`` is none, but a whole configuration.
      ValueError: no such ``nonfinite``.

    >>> state = init({"w": jnp.zeros(1)})
    >>> for value in (1.0, 2.0, 6.0):
    ...     state = accumulate(state, {"w": jnp.array([value])})
    >>> reading.averaged_params(state, {"w": jnp.array([6.0])})
    {'w': Array([3.], dtype=float32)}
    """
    if isinstance(rule, str | Mapping):
        rule = SWAConfig.from_dict({"rule": rule}).rule
    if not isinstance(rule, Rule):
        raise TypeError(
            'rule must be a Rule, "uniform" or {"name": "ema", "decay": 0.999}, got '
            f"{type(rule).__name__}; that of a SWAConfig is its .rule"
        )
    if nonfinite not in ("skip", "keep"):
        raise ValueError(f'nonfinite must be "skip" or "keep", got {nonfinite!r}')
    try:
        state = find_state(state)
    except StateError:
        expect_parameters(params, "accumulate(state, params)")
        raise
    refuse_shapes_alone("n_averaged", state.n_averaged)
    try:
        return _joined(state, params, rule, nonfinite)
    except RuntimeError:
        refuse_deleted(state._asdict() | leaves(state.average), "cannot average")
        raise


@partial(jax.jit, donate_argnums=0, static_argnums=(2, 3))
def _joined(state: SWAState, params: Tree, rule: Rule, nonfinite: str) -> SWAState:
    # Compared when traced: at every call it would take longer than the snapshot of small leaves.
    state = expect_state(state)
    new = parameters_now(state, params)
    old, structure = jax.tree.flatten(state.average)
    n = increment(state.n_averaged)
    average, total = mixed(rule, old, new, n), total_after(rule, n)
    taken = jnp.array(True)
    if nonfinite == "skip":
        taken = finite_everywhere(_apart(new), state.n_updates)
        average = [jnp.where(taken, mix, leaf) for mix, leaf in zip(average, old, strict=True)]
    return SWAState(
        n_updates=increment(state.n_updates),
        n_averaged=jnp.where(taken, n, state.n_averaged),
        n_skipped=jnp.where(taken, state.n_skipped, increment(state.n_skipped)),
        total=jnp.where(taken, total, state.total),
        average=jax.tree.unflatten(structure, average),
    )


def _apart(leaves: Leaves) -> Leaves:
    """The same leaves for a look of their own.

    Half-precision ones are widened for the look and for the mean. Where the compiler knows that
    they are the same, it does so once, and keeps all of them in float32 between the two.
    """
    if not hasattr(lax, "optimization_barrier"):  # an older JAX
        return leaves
    apart: Leaves = lax.optimization_barrier([lax.stop_gradient(leaf) for leaf in leaves])
    return apart
