"""swa_keras' optimizer wrapper under the conformance kit, eager and in the compiled step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from drivers.keras_driver import Scripted, Weighted
from swa_core.testing import Driver
from swa_keras import SWAOptimizer

# Compiling takes longer than a few updates, so the step is compiled for the longer scripts.
EAGER = 10


class KerasOptimizerDriver(Driver):
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def start(
        self, weights, config, *, steps_per_epoch=None, total_steps=None, frozen=(), tied=None
    ):
        self.frozen, self.tied = frozen, dict(tied or {})
        self.model = Weighted(weights, frozen, self.tied)
        self.optimizer = SWAOptimizer(
            Scripted(), config, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )
        self.optimizer.build(self.model.trainable_variables)
        self.updates, self.compiled = 0, None

    def train(self, weights):
        model = self.model
        now = {name: (v.shape, v.dtype) for name, v in model.named.items()}
        changed = {name: (leaf.shape, leaf.dtype.name) for name, leaf in weights.items()} != now
        if changed:
            # A variable cannot change, but a user can build another model and train that.
            model = Weighted(weights, self.frozen, self.tied)
        variables = model.trainable_variables
        targets = {model.named[name].path: leaf for name, leaf in weights.items()}
        trained = {v.path for v in variables}
        model.set({n: leaf for n, leaf in weights.items() if model.named[n].path not in trained})
        grads = [keras.ops.convert_to_tensor(targets[v.path]) for v in variables]
        if changed or self.updates < EAGER:
            self.optimizer.apply(grads, variables)
        else:
            self.compiled = self.compiled or compiled(self.optimizer, variables)
            self.compiled(grads)
        self.updates += 1

    def weights(self):
        return self.model.get()

    def average(self):
        paths = [v.path for v in self.model.trainable_variables]
        by_path = dict(zip(paths, self.optimizer.averaged_weights, strict=True))
        named = {name: by_path.get(v.path) for name, v in self.model.named.items()}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def n_averaged(self):
        return self.optimizer.n_averaged

    def n_skipped(self):
        return self.optimizer.n_skipped

    def averaged(self):
        return self.optimizer.averaged(self.model)

    def finalize(self):
        self.optimizer.finalize(self.model)

    def save(self):
        return {"model": self.model.get(), "swa": self.optimizer.state_dict()}

    def load(self, saved):
        self.model.set(saved["model"])
        self.optimizer.load_state_dict(saved["swa"], self.model)


def compiled(optimizer: Any, variables: list[Any]) -> Any:
    """The step as Keras' trainers compile it: gradients in, variables updated."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda grads: optimizer.apply(grads, variables), jit_compile=True)
    if keras.backend.backend() == "torch":
        return lambda grads: optimizer.apply(grads, variables)
    import jax

    step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))

    def apply(grads):
        own = optimizer.variables
        new, new_own = step([v.value for v in own], grads, [v.value for v in variables])
        for variable, value in zip([*variables, *own], [*new, *new_own], strict=True):
            variable.assign(value)

    return apply
