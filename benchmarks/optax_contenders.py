"""Who averages parameters in a training with JAX: ours, what people write, and other libraries.

A library whose own code cannot be installed beside ours has its arithmetic written out here, and
its source named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import swa_optax

Tree = Any

DECAY = 0.9
EVERY = 10
NEVER = 10**9
PLAIN = "without averaging"
UNTOUCHED = "an average carried along, untouched"
BY_HAND = "EMA by hand, in the step"
WHERE = "where, every 10th"
ZERO = "weight 0, every 10th"


def of_every(update: int) -> float:
    """How much update ``update`` (the first is 1) weighs in a mean of all.

    >>> [of_every(update) for update in (1, 2, 4)]
    [1.0, 0.5, 0.25]
    """
    return 1 / update


def of_tenths(update: int) -> float:
    """How much it weighs in a mean of update 1 and every 10th after it.

    >>> [of_tenths(update) for update in (1, 2, 11, 21)]
    [1.0, 0.0, 0.5, 0.3333333333333333]
    """
    snapshots, others = divmod(update - 1, EVERY)
    return 0.0 if others else 1 / (snapshots + 1)


def of_none(update: int) -> float:
    """How much it weighs where nothing is averaged."""
    return 0.0


def of_ema(update: int) -> float:
    """How much it weighs in a moving average of constant decay."""
    return 1 - DECAY


def of_warm_up(update: int) -> float:
    """How much it weighs where the decay grows with the updates, as in Kauldron.

    >>> of_warm_up(1) == 1 - 2 / 11, of_warm_up(1000) == of_ema(1000)
    (True, True)
    """
    return 1 - min(DECAY, (1 + update) / (10 + update))


def _nothing(params: Tree) -> Any:
    return ()


def _as_it_is(kept: Any, params: Tree) -> Any:
    return kept


@dataclass(frozen=True)
class Contender:
    """One way to average.

    Attributes:
      name: its row in the tables.
      mix: how much an update weighs in its average, by its number.
      chained: what it appends to the optimizer.
      init: what it keeps beside the optimizer's state, made of the parameters.
      in_step: what it keeps after an update, computed in the compiled step.
      in_loop: the same computed by a call of its own after the step, or None.
      average: its average, from the optimizer's state and what it keeps.
      from_zero: whether it begins with zeros and not with the parameters.
    """

    name: str
    mix: Callable[[int], float]
    chained: optax.GradientTransformation | None = None
    init: Callable[[Tree], Any] = _nothing
    in_step: Callable[[Any, Tree], Any] = _as_it_is
    in_loop: Callable[[Any, Tree], Any] | None = None
    average: Callable[[Any, Any], Tree] = lambda opt_state, kept: kept
    from_zero: bool = False

    def optimizer(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimizer of the training."""
        return inner if self.chained is None else optax.chain(inner, self.chained)


def _copy(params: Tree) -> Tree:
    return jax.tree.map(partial(jnp.array, copy=True), params)


def carried_along() -> Contender:
    """An average that the step is given and gives back, and that nothing is done with."""
    return Contender(UNTOUCHED, of_none, init=_copy)


def ours(every: int, nonfinite: str) -> Contender:
    """The transformation at the end of the chain."""
    when = {1: "every update", EVERY: "every 10th", NEVER: "never due"}[every]
    start = NEVER if every == NEVER else 1
    config = {"start": f"{start}step", "every": f"{every}step", "nonfinite": nonfinite}
    return Contender(
        f"swa_optax.swa, {when}, {nonfinite}",
        {1: of_every, EVERY: of_tenths, NEVER: of_none}[every],
        chained=swa_optax.swa(config),
        average=lambda opt_state, kept: opt_state[-1].average,
    )


def ours_in_the_loop(every: int) -> Contender:
    """``accumulate``, called where a snapshot is due, and looking for NaN."""

    def after(kept: Any, params: Tree) -> Any:
        count, state = kept
        if count % every == 0:
            state = swa_optax.accumulate(state, params)
        return count + 1, state

    when = "every update" if every == 1 else "every 10th"
    return Contender(
        f"swa_optax.accumulate, {when}",
        of_every if every == 1 else of_tenths,
        init=lambda params: (0, swa_optax.init(params)),
        in_loop=after,
        average=lambda opt_state, kept: kept[1].average,
    )


def by_hand() -> Contender:
    """What is written into a train step."""

    def lerp(kept: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda a, p: a + (1 - DECAY) * (p - a), kept, params)

    return Contender(BY_HAND, of_ema, init=_copy, in_step=lerp)


def incremental_update() -> Contender:
    """optax' function in the loop, compiled and donated as it should be."""
    update = jax.jit(partial(optax.incremental_update, step_size=1 - DECAY), donate_argnums=1)
    return Contender(
        "optax.incremental_update in the loop",
        of_ema,
        init=_copy,
        in_loop=lambda kept, params: update(params, kept),
    )


def optax_ema() -> Contender:
    """optax' transformation, given the parameters in the place of updates."""
    ema = optax.ema(DECAY)
    return Contender(
        "optax.ema of parameters, in the step",
        of_ema,
        init=ema.init,
        in_step=lambda kept, params: ema.update(params, kept)[1],
        average=lambda opt_state, kept: kept.ema,
        from_zero=True,
    )


class EmaState(NamedTuple):
    """A counter and an average, as Kauldron's and axlearn's states hold them."""

    count: jax.Array
    ema: Tree


def kauldron() -> Contender:
    """``kd.optim.ema_params``: a transformation with a decay that grows, by ``update_moment``.

    Source: google-research/kauldron, kauldron/optim/ema_params.py, as of 2026.
    """

    def update(updates: Tree, state: EmaState, params: Tree = None) -> tuple[Tree, EmaState]:
        count = optax.safe_increment(state.count)
        decay = jnp.minimum(DECAY, (1 + count) / (10 + count))
        after = optax.apply_updates(params, updates)
        return updates, EmaState(count, optax.update_moment(after, state.ema, decay, order=1))

    def init(params: Tree) -> EmaState:
        return EmaState(jnp.zeros([], jnp.int32), _copy(params))

    return Contender(
        "Kauldron's way, in the step",
        of_warm_up,
        chained=optax.GradientTransformation(init, update),
        average=lambda opt_state, kept: opt_state[-1].ema,
    )


def axlearn() -> Contender:
    """``param_ema``, which axlearn's learner calls with the updated parameters; from zeros.

    Source: apple/axlearn, axlearn/common/optimizers.py and learner.py.
    """

    def update(kept: EmaState, params: Tree) -> EmaState:
        decay = jnp.asarray(DECAY, jnp.float32)
        moved = jax.tree.map(lambda p, a: (1 - decay) * p + decay * a, params, kept.ema)
        return EmaState(optax.safe_increment(kept.count), moved)

    def init(params: Tree) -> EmaState:
        return EmaState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    return Contender(
        "axlearn's way, in the step",
        of_ema,
        init=init,
        in_step=update,
        average=lambda opt_state, kept: kept.ema,
        from_zero=True,
    )


def gated(name: str) -> Contender:
    """The two ways of leaving updates out that are shorter to write than a condition."""

    def update(kept: tuple[jax.Array, Tree], params: Tree) -> tuple[jax.Array, Tree]:
        count, average = kept
        due = count % EVERY == 0
        weight = 1 / (1 + count // EVERY).astype(jnp.float32)
        if name == ZERO:
            weight = jnp.where(due, weight, 0)
        moved = jax.tree.map(lambda a, p: a + weight * (p - a), average, params)
        if name == WHERE:
            moved = jax.tree.map(partial(jnp.where, due), moved, average)
        return count + 1, moved

    return Contender(
        name,
        of_tenths,
        init=lambda params: (jnp.zeros([], jnp.int32), _copy(params)),
        in_step=update,
        average=lambda opt_state, kept: kept[1],
    )


CONTENDERS = [
    Contender(PLAIN, of_none, average=lambda opt_state, kept: None),
    *(ours(every, how) for every in (NEVER, EVERY, 1) for how in ("keep", "skip")),
    *(ours_in_the_loop(every) for every in (EVERY, 1)),
    gated(WHERE),
    gated(ZERO),
    by_hand(),
    incremental_update(),
    optax_ema(),
    kauldron(),
    axlearn(),
]
