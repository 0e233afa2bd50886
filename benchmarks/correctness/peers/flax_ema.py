"""flax ``nnx.EMA``: as it comes, and of the parameters alone."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from correctness.cells import NotApplicableError
from correctness.jax_training import host
from correctness.nnx_model import Model, go_to
from correctness.peer import Outcome, Statistics, SteppedPeer, Training, Tree
from correctness.rules import DECAY, EMA_FROM_INITIAL
from correctness.scripts import Array, Intent, Script, batches


def read(model: Any) -> dict[str, Any]:
    """Kernel and bias."""
    return {name: getattr(model, name)[...] for name in ("kernel", "bias")}


class NNXTraining(Training):
    """``ema.update(model)`` after each step, ``ema.apply_to(model)`` to evaluate.

    Args:
      only: the filter of what is averaged, None for the default.
    """

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        only: Any = None,
    ) -> None:
        if intent is not None:
            raise NotApplicableError("no schedule: the loop counts")
        if compiled:
            raise NotApplicableError("knows no names")
        self.script = script
        self.model = Model(script)
        keywords = {} if only is None else {"only": only}
        self.ema = nnx.EMA(self.model, decay=DECAY, **keywords)
        self.inputs = [jnp.array(x) for x in batches(script)] if script.batch_norm else []
        self.update = nnx.jit(lambda ema, model: ema.update(model))

    def step(self, update: int) -> None:
        if self.inputs:
            self.model.train()
            self.model(self.inputs[update % len(self.inputs)])
        go_to(self.model, self.script, update)
        self.update(self.ema, self.model)

    def live(self) -> Tree:
        return host(read(self.model))

    def outcome(self) -> Outcome:
        evaluated = self.ema.apply_to(self.model)
        average = read(evaluated)
        outcome = Outcome(host(average), str(average["kernel"].dtype), self.live())
        if self.script.tied:
            outcome.average["tied"] = np.array(evaluated.tied[...], np.float64)
            outcome.tied = evaluated.tied is evaluated.kernel
        if self.script.counts is not None:
            outcome.count = float(evaluated.count[...])
        return outcome

    def batch_norm(self, inputs: list[Array]) -> Statistics:
        def of(model: Any) -> dict[str, Array]:
            return {
                name: np.array(getattr(model.norm, name)[...], np.float64)
                for name in ("mean", "var")
            }

        evaluated = self.ema.apply_to(self.model)
        weights = host(read(evaluated))
        return Statistics(weights, of(evaluated), of(self.model), biased=True, how="")

    def save(self) -> bytes:
        return pickle.dumps(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(self.ema))))

    def load(self, saved: bytes) -> None:
        state = nnx.state(self.ema)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, pickle.loads(saved)))
        nnx.update(self.ema, state)

    def shares_memory(self) -> bool:
        average, live = read(self.ema.apply_to(self.model)), read(self.model)
        return any(
            average[name].unsafe_buffer_pointer() == live[name].unsafe_buffer_pointer()
            for name in live
        )


PEERS = [
    SteppedPeer("flax nnx.EMA", EMA_FROM_INITIAL, NNXTraining, copies=False),
    SteppedPeer(
        "flax nnx.EMA, only=Param",
        EMA_FROM_INITIAL,
        NNXTraining,
        copies=False,
        keywords={"only": nnx.Param},
    ),
]
