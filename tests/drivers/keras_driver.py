"""swa_keras under the conformance kit: real Keras variables and optimizer, a custom loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np

from swa_core.testing import Driver, Weights
from swa_keras import SWA
from swa_keras.backend import current


class Scripted(keras.optimizers.Optimizer):
    """The "gradient" of a variable is the value it is to have."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.1)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign(variable, gradient)

    def get_config(self) -> dict[str, Any]:
        return {}


class Weighted(keras.Model):
    """A model that is nothing but its weights; a tied one stands in two layers."""

    def __init__(self, weights: Weights, frozen: Any, tied: Mapping[str, str]) -> None:
        super().__init__()
        self.named: dict[str, Any] = {}
        for name, value in weights.items():
            if name not in tied:
                floating = keras.backend.is_float_dtype(value.dtype.name)
                self.named[name] = self.add_weight(
                    name=name,
                    shape=value.shape,
                    dtype=value.dtype.name,
                    trainable=floating and name not in frozen,
                    initializer="zeros",
                    autocast=False,
                )
        for alias, name in tied.items():
            other = keras.layers.Layer(name=alias)
            other.shared = self.named[alias] = self.named[name]
            setattr(self, f"tied_{alias}", other)
        self.built = True
        self.compile(Scripted())
        self.set(weights)

    def set(self, weights: Weights) -> None:
        for name, value in weights.items():
            self.named[name].assign(keras.ops.convert_to_tensor(value))

    def get(self) -> Weights:
        return {name: array_of(v) for name, v in self.named.items()}


def array_of(variable: Any) -> np.ndarray:
    """A copy in the variable's own dtype; Keras' own conversion warns with numpy 2."""
    value = keras.ops.convert_to_tensor(variable)
    if variable.dtype == "bfloat16":  # through float32, since torch has none for numpy
        value = keras.ops.cast(value, "float32")
    return current().to_numpy(value).astype(np.dtype(variable.dtype))


class KerasDriver(Driver):
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def start(
        self, weights, config, *, steps_per_epoch=None, total_steps=None, frozen=(), tied=None
    ):
        self.frozen, self.tied = frozen, dict(tied or {})
        self.model = Weighted(weights, frozen, self.tied)
        self.swa = SWA(config)
        self.swa.begin(self.model, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    def train(self, weights):
        model = self.model
        now = {name: (v.shape, v.dtype) for name, v in model.named.items()}
        if {name: (leaf.shape, leaf.dtype.name) for name, leaf in weights.items()} != now:
            # A variable cannot change, but a user can build another model and train that.
            model = Weighted(weights, self.frozen, self.tied)
        variables = model.trainable_variables
        targets = {model.named[name].path: leaf for name, leaf in weights.items()}
        trained = {v.path for v in variables}
        model.set({n: leaf for n, leaf in weights.items() if model.named[n].path not in trained})
        model.optimizer.apply(
            [keras.ops.convert_to_tensor(targets[v.path]) for v in variables], variables
        )
        self.swa.update(model)

    def weights(self):
        return self.model.get()

    def average(self):
        paths = [v.path for v in self.model.trainable_variables]
        by_path = dict(zip(paths, self.swa.averaged_weights, strict=True))
        named = {name: by_path.get(v.path) for name, v in self.model.named.items()}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def n_averaged(self):
        return self.swa.n_averaged

    def n_skipped(self):
        return self.swa.n_skipped

    def averaged(self):
        return self.swa.averaged(self.model)

    def finalize(self):
        self.swa.finalize(self.model)

    def save(self):
        return {"model": self.model.get(), "swa": self.swa.state_dict()}

    def load(self, saved):
        self.model.set(saved["model"])
        self.swa.load_state_dict(saved["swa"])
