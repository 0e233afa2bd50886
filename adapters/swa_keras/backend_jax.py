"""Averages as jax arrays: one jitted lerp over all of them that reuses their memory.

Averages are sharded as the variables are. Where those are spread over several processes, every
process runs all of this, in the same order, as it runs the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

from swa_core import BatchNormError
from swa_keras.backend import Variable, wide
from swa_keras.loan_jax import Loan, keep_in_evaluation


def _lerp(averages: list[jax.Array], values: list[jax.Array], weight: Any) -> list[jax.Array]:
    return [
        average + (value.astype(average.dtype) - average) * weight.astype(average.dtype)
        for average, value in zip(averages, values, strict=True)
    ]


@lru_cache(maxsize=8)
def _lerp_into(shardings: tuple[jax.sharding.Sharding | None, ...]) -> Callable[..., Any]:
    return jax.jit(_lerp, donate_argnums=0, out_shardings=list(shardings))


def _sharding(average: jax.Array) -> jax.sharding.Sharding | None:
    """What to say of the layout of the result. On a mesh jax would infer an equivalent one that is
    spelt differently; on one device nothing may be said, for that would pin the result to it, and
    a step that then trains on it would be compiled again.
    """
    one = isinstance(average.sharding, jax.sharding.SingleDeviceSharding)
    return None if one else average.sharding


@jax.jit
def finite_sums(values: list[jax.Array]) -> jax.Array:
    # Of all reductions the sum alone runs at the speed of memory.
    wide_ = [value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values]
    return jnp.isfinite(jnp.stack([value.sum(dtype=jnp.float32) for value in wide_])).all()


@jax.jit
def each_finite(values: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(value).all() for value in values]).all()


class _JaxBackend:
    def copies(self, variables: Sequence[Variable]) -> list[jax.Array]:
        # The trainer donates the model's arrays to its next step, so nothing may be kept of them.
        return [jnp.array(v.value, dtype=wide(v.dtype), copy=True) for v in variables]

    def lerp(
        self, averages: list[jax.Array], variables: Sequence[Variable], weight: float
    ) -> list[jax.Array]:
        lerp = _lerp_into(tuple(map(_sharding, averages)))
        moved: list[jax.Array] = lerp(averages, [v.value for v in variables], np.asarray(weight))
        return moved

    def all_finite(self, variables: Sequence[Variable]) -> bool:
        values = [v.value for v in variables]
        # A sum is NaN or infinite if an element is; one that only overflows is looked at again.
        return bool(finite_sums(values)) or bool(each_finite(values))

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
            _placed(array, v.value.sharding) for array, v in zip(arrays, variables, strict=True)
        ]

    def to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        if isinstance(tensor, jax.Array) and not (
            tensor.is_fully_addressable or tensor.is_fully_replicated
        ):
            # A collective: each process has but its own shards.
            tensor = multihost_utils.process_allgather(tensor, tiled=True)
        return np.array(tensor)

    def batch(self, array: Any) -> jax.Array:
        distribution = keras.distribution.distribution()
        is_global = isinstance(array, jax.Array) and not array.is_fully_addressable
        is_dense = isinstance(array, (np.ndarray, jax.Array)) and array.ndim > 0
        if distribution is None or is_global or not is_dense:
            return keras.ops.convert_to_tensor(array)
        layout = distribution.get_data_layout(array.shape).backend_layout
        local = np.asarray(array)
        local = local.astype(jax.dtypes.canonicalize_dtype(local.dtype), copy=False)
        try:
            return jax.make_array_from_process_local_data(layout, local)
        except ValueError as error:
            if jax.process_count() == 1:  # where a ragged last batch can stay whole
                return keras.ops.convert_to_tensor(array)
            raise BatchNormError(
                f"a batch of {len(local)} on each of {jax.process_count()} processes cannot be cut "
                f"for {layout.mesh.shape} devices.",
                hint="give every process batches that fit can cut, and leave the remainder out.",
            ) from error

    def forked_random(self) -> AbstractContextManager[Any]:
        return nullcontext()  # jax has no random numbers but those of a key

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)


def _placed(array: npt.NDArray[Any], sharding: jax.sharding.Sharding) -> jax.Array:
    """The array in shards that no device holds more of than it keeps."""
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


make = _JaxBackend
