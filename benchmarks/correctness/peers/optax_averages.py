"""optax: ``incremental_update`` in the loop, and ``optax.ema`` handed the parameters as updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from correctness.cells import NotApplicableError
from correctness.jax_training import JaxTraining, Params
from correctness.peer import SteppedPeer
from correctness.rules import DECAY, EMA_DEBIASED, EMA_FROM_INITIAL, UNIFORM
from correctness.scripts import Intent, Script


class IncrementalTraining(JaxTraining):
    """``average = incremental_update(params, average, step_size)`` after each step.

    Args:
      uniform: whether the step size is one over the number of snapshots.
    """

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        uniform: bool = False,
    ) -> None:
        self.uniform = uniform
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        if self.intent is not None:
            raise NotApplicableError("no schedule: the loop counts")
        self.average: Any = self.params
        self.update = jax.jit(optax.incremental_update)

    def after_step(self, update: int) -> None:
        share = 1.0 / update if self.uniform else 1.0 - DECAY
        self.average = self.update(self.params, self.average, share)

    def averages(self) -> Params:
        return self.average

    def shares_memory(self) -> bool:
        raise NotApplicableError("the caller makes the first average")

    def state(self) -> Any:
        return self.average

    def restore(self, state: Any) -> None:
        self.average = state


class EMATraining(JaxTraining):
    """``optax.ema`` on its own, not in a chain, where it would average updates."""

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        **keywords: Any,
    ) -> None:
        self.keywords = keywords
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        if self.intent is not None:
            raise NotApplicableError("no schedule: the loop counts")
        transformation = optax.ema(DECAY, **self.keywords)
        self.average = self.opt_state = transformation.init(self.params)
        self.update = jax.jit(transformation.update)

    def after_step(self, update: int) -> None:
        self.average, self.opt_state = self.update(self.params, self.opt_state)

    def averages(self) -> Params:
        return getattr(self.average, "ema", self.average)

    def state(self) -> Any:
        return self.opt_state

    def restore(self, state: Any) -> None:
        self.opt_state = state


WIDE = {"accumulator_dtype": jnp.float32}
PEERS = [
    SteppedPeer("optax incremental_update", EMA_FROM_INITIAL, IncrementalTraining, copies=False),
    SteppedPeer(
        "optax incremental_update, 1/n",
        UNIFORM,
        IncrementalTraining,
        copies=False,
        keywords={"uniform": True},
    ),
    SteppedPeer("optax ema of parameters", EMA_DEBIASED, EMATraining, copies=False),
    SteppedPeer(
        "optax ema, accumulator_dtype", EMA_DEBIASED, EMATraining, copies=False, keywords=WIDE
    ),
]
