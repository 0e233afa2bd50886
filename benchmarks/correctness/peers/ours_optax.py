"""``swa_optax.swa`` at the end of a chain, with models of flax nnx where one is needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from correctness.cells import NotApplicableError
from correctness.jax_training import JaxTraining, Params, follow, host, params_at
from correctness.nnx_model import Model, go_to
from correctness.peer import Outcome, Statistics, SteppedPeer, Training, Tree
from correctness.rules import UNIFORM
from correctness.scripts import Array, Intent, Script, batches
from swa_optax import averaged_params, swa, update_bn


def config_of(intent: Intent | None) -> dict[str, str]:
    """The configuration a user writes."""
    start, every = (intent.start, intent.every) if intent else (1, 1)
    return {"start": f"{start}step", "every": f"{every}step"}


class ChainTraining(JaxTraining):
    """``chain(follow, swa)``, the step compiled."""

    def make_averager(self) -> None:
        self.tx = optax.chain(follow(), swa(config_of(self.intent)))
        self.opt_state = self.tx.init(self.params)

        @jax.jit
        def train_step(params: Params, opt_state: Any, target: Params) -> tuple[Params, Any]:
            updates, opt_state = self.tx.update(target, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.train_step = train_step

    def step(self, update: int) -> None:
        target = params_at(self.script, update)
        if not jnp.isfinite(self.params["kernel"]).all():
            # No update leads from NaN to a number: the user has loaded what was saved.
            self.params = self.params | params_at(self.script, update)
        if self.script.counts is not None:
            target["count"] = jnp.int32(self.script.counts[update])
        self.params, self.opt_state = self.train_step(self.params, self.opt_state, target)

    def averages(self) -> Params:
        """What is kept, in its own precision; the parameters before a first snapshot."""
        (_, state) = self.opt_state
        if int(state.n_averaged):
            return state.average
        return averaged_params(self.opt_state, self.params)

    def evaluated_params(self) -> Params:
        return averaged_params(self.opt_state, self.params)

    def shares_memory(self) -> bool:
        (_, state) = self.opt_state
        return any(
            state.average[name].unsafe_buffer_pointer() == self.params[name].unsafe_buffer_pointer()
            for name in ("kernel", "bias")
        )

    def state(self) -> Any:
        return {"params": self.params, "opt_state": self.opt_state}

    def restore(self, state: Any) -> None:
        self.params, self.opt_state = state["params"], state["opt_state"]


class NNXTraining(Training):
    """The same behind ``nnx.Optimizer``, for what only a model has: ties and batch norm."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.model = Model(script)
        tx = optax.chain(follow(), swa(config_of(None)))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.inputs = [jnp.array(x) for x in batches(script)] if script.batch_norm else []
        self.update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))

    def step(self, update: int) -> None:
        if self.inputs:
            self.model.train()
            self.model(self.inputs[update % len(self.inputs)])
        ahead = Model(self.script)
        go_to(ahead, self.script, update)
        self.update(self.optimizer, self.model, nnx.state(ahead, nnx.Param))

    def live(self) -> Tree:
        return host({name: getattr(self.model, name)[...] for name in ("kernel", "bias")})

    def outcome(self) -> Outcome:
        evaluated = averaged_params(self.optimizer, self.model)
        names = ("kernel", "bias", "tied")
        average = {name: np.array(getattr(evaluated, name)[...], np.float64) for name in names}
        dtype = str(evaluated.kernel.dtype)
        return Outcome(average, dtype, self.live(), tied=evaluated.tied is evaluated.kernel)

    def batch_norm(self, inputs: list[Array]) -> Statistics:
        evaluated = averaged_params(self.optimizer, self.model)
        update_bn(lambda model, x: model(x), evaluated, [jnp.array(x) for x in inputs])
        weights = host({name: getattr(evaluated, name)[...] for name in ("kernel", "bias")})
        found = {
            name: np.array(getattr(evaluated.norm, name)[...], np.float64)
            for name in ("mean", "var")
        }
        return Statistics(weights, found, None, biased=True, how="update_bn")


def build(script: Script, intent: Intent | None = None, *, compiled: bool = False) -> Training:
    """The training that a script needs."""
    if compiled:
        raise NotApplicableError("knows no names")
    if script.tied or script.batch_norm:
        return NNXTraining(script)
    return ChainTraining(script, intent)


PEERS = [SteppedPeer("swa_optax swa", UNIFORM, build, exact=False, copies=False)]
