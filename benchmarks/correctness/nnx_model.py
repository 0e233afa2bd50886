"""The model in flax nnx."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from correctness.scripts import Script


class Count(nnx.Variable):
    """An integer beside the parameters."""


class Model(nnx.Module):
    """``x @ kernel + bias``, then the parts that a script asks for."""

    def __init__(self, script: Script) -> None:
        dtype = jnp.dtype(script.dtype)
        self.kernel = nnx.Param(jnp.array(script.kernel[0], dtype))
        self.bias = nnx.Param(jnp.array(script.bias[0], dtype))
        if script.tied:
            self.tied = self.kernel
        if script.counts is not None:
            self.count = Count(jnp.int32(script.counts[0]))
        if script.batch_norm:
            columns = script.bias.shape[1]
            self.norm = nnx.BatchNorm(
                columns, use_bias=False, use_scale=False, rngs=nnx.Rngs(0), momentum=0.9
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...] + self.bias[...]
        return self.norm(y) if hasattr(self, "norm") else y


def go_to(model: Model, script: Script, update: int) -> None:
    """Puts an update's weights into a model."""
    for name, value in script.at(update).items():
        variable = getattr(model, name)
        variable[...] = jnp.array(value, variable.dtype)
    if script.counts is not None:
        model.count[...] = jnp.int32(script.counts[update])
