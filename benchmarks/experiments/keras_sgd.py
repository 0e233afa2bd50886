"""SGD as PyTorch and optax have it, in Keras."""

from __future__ import annotations

from typing import Any

import keras


class SGD(keras.optimizers.SGD):
    """Weight decay is a part of the gradient, and momentum is gathered without the rate.

    Keras' own decays weights apart from the gradient, and keeps the rates of past updates in its
    momentum: when the rate falls within an epoch, as in the cyclical arm, it is another training.
    """

    def __init__(self, rate: float, *, momentum: float, weight_decay: float):
        super().__init__(rate, momentum=momentum)
        # Not ``weight_decay``, which Keras would apply as well.
        self.decay = weight_decay

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        momentum = self.momentums[self._get_variable_index(variable)]
        ops = keras.ops
        gradient = gradient + self.decay * ops.convert_to_tensor(variable)
        gathered = self.momentum * ops.convert_to_tensor(momentum) + gradient
        self.assign(momentum, gathered)
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * gathered)
