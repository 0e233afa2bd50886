"""Trainings in JAX: parameters in a dictionary, a transformation that goes by the script."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from correctness.cells import NotApplicableError
from correctness.peer import Outcome, Training, Tree
from correctness.scripts import Array, Intent, Script

Params = dict[str, jax.Array]


def follow() -> optax.GradientTransformation:
    """The gradients are the next parameters: the update is the way there.

    It is computed in float32 at least, so that half-precision parameters arrive exactly; float32
    ones do but for the last bit.
    """

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        def way(target: jax.Array, now: jax.Array) -> jax.Array:
            return jnp.asarray(target, jnp.float32) - jnp.asarray(now, jnp.float32)

        return jax.tree.map(way, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def params_at(script: Script, update: int) -> Params:
    """The weights after so many updates."""
    dtype = jnp.dtype(script.dtype)
    return {name: jnp.array(value, dtype) for name, value in script.at(update).items()}


def host(tree: Any) -> dict[str, Array]:
    """Float64 copies of the kernel and the bias."""
    return {name: np.array(tree[name], np.float64) for name in ("kernel", "bias")}


class JaxTraining(Training):
    """A loop over parameters; subclasses put the averager into it."""

    def __init__(
        self, script: Script, intent: Intent | None = None, *, compiled: bool = False
    ) -> None:
        if compiled:
            raise NotApplicableError("knows no names")
        self.script, self.intent = script, intent
        self.params = params_at(script, 0)
        if script.counts is not None:
            self.params["count"] = jnp.int32(script.counts[0])
        self.make_averager()

    def make_averager(self) -> None:
        """Whatever is made before the loop."""
        raise NotImplementedError

    def after_step(self, update: int) -> None:
        """What the loop does with the new parameters."""
        raise NotImplementedError

    def averages(self) -> Any:
        """The average as a user reads it: a tree like the parameters, or what it is kept as."""
        raise NotImplementedError

    def step(self, update: int) -> None:
        self.params = params_at(self.script, update)
        if self.script.counts is not None:
            self.params["count"] = jnp.int32(self.script.counts[update])
        self.after_step(update)

    def live(self) -> Tree:
        return host(self.params)

    def outcome(self) -> Outcome:
        average = self.averages()
        outcome = Outcome(host(average), str(average["kernel"].dtype), self.live())
        if self.script.counts is not None:
            outcome.count = float(self.evaluated_params()["count"])
        return outcome

    def evaluated_params(self) -> Params:
        """What a model is evaluated with."""
        return self.averages()

    def shares_memory(self) -> bool:
        average = self.averages()
        return any(
            average[name].unsafe_buffer_pointer() == self.params[name].unsafe_buffer_pointer()
            for name in ("kernel", "bias")
        )

    def state(self) -> Any:
        """The tree of arrays that a user saves."""
        raise NotImplementedError

    def restore(self, state: Any) -> None:
        """Puts it in place again."""
        raise NotImplementedError

    def save(self) -> bytes:
        return pickle.dumps(jax.tree.map(np.asarray, self.state()))

    def load(self, saved: bytes) -> None:
        self.restore(jax.tree.map(jnp.asarray, pickle.loads(saved)))
