"""Averages as jax arrays: one jitted lerp over all of them that reuses their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from swa_keras.backend import Variable, wide
from swa_keras.loan_jax import Loan, keep_in_evaluation


@partial(jax.jit, donate_argnums=0)
def _lerp(averages: list[jax.Array], values: list[jax.Array], weight: Any) -> list[jax.Array]:
    return [
        average + (value.astype(average.dtype) - average) * weight.astype(average.dtype)
        for average, value in zip(averages, values, strict=True)
    ]


@jax.jit
def _finite_sums(values: list[jax.Array]) -> jax.Array:
    # Of all reductions the sum alone runs at the speed of memory.
    wide_ = [value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values]
    return jnp.isfinite(jnp.stack([value.sum(dtype=jnp.float32) for value in wide_])).all()


@jax.jit
def _all_finite(values: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(value).all() for value in values]).all()


class _JaxBackend:
    def copies(self, variables: Sequence[Variable]) -> list[jax.Array]:
        # The trainer donates the model's arrays to its next step, so nothing may be kept of them.
        return [jnp.array(v.value, dtype=wide(v.dtype), copy=True) for v in variables]

    def lerp(
        self, averages: list[jax.Array], variables: Sequence[Variable], weight: float
    ) -> list[jax.Array]:
        moved: list[jax.Array] = _lerp(averages, [v.value for v in variables], np.asarray(weight))
        return moved

    def all_finite(self, variables: Sequence[Variable]) -> bool:
        values = [v.value for v in variables]
        # A sum is NaN or infinite if an element is; one that only overflows is looked at again.
        return bool(_finite_sums(values)) or bool(_all_finite(values))

    def copy_state(self, variables: Sequence[Variable]) -> list[jax.Array]:
        return [jnp.array(v.value, copy=True) for v in variables]

    def assign(self, variables: Sequence[Variable], values: Sequence[jax.Array]) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(jnp.array(value, dtype=variable.dtype, copy=True))

    def keep_in_evaluation(self, model: Any) -> None:
        keep_in_evaluation(model)

    def lend(self, variables: Sequence[Variable], averages: list[jax.Array]) -> Loan:
        return Loan(variables, averages)

    def from_numpy(
        self, arrays: Sequence[npt.NDArray[Any]], variables: Sequence[Variable]
    ) -> list[jax.Array]:
        return [
            jax.device_put(jnp.array(array, copy=True), v.value.sharding)
            for array, v in zip(arrays, variables, strict=True)
        ]

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        return np.array(tensor)

    def forked_random(self) -> AbstractContextManager[Any]:
        return nullcontext()  # jax has no random numbers but those of a key

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)


make = _JaxBackend
