"""Numbers of one dtype in another: widened to be summed, rounded once at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from swa_core.checkpoints.tensors import Array, Spec


def accumulator(spec: Spec, least: str) -> np.dtype[Any]:
    """The dtype that a tensor is summed in: ``least``, or wider if the tensor is.

    >>> accumulator(Spec("bfloat16", ()), "float32"), accumulator(Spec("complex64", ()), "float64")
    (dtype('float32'), dtype('complex128'))
    """
    own = np.dtype("float32") if spec.dtype == "bfloat16" else spec.storage
    return np.promote_types(own, least)


def widened(piece: Array, spec: Spec, dtype: np.dtype[Any]) -> Array:
    """A piece as numbers of a wider dtype; perhaps its own memory.

    >>> widened(np.array([0x3FC0], np.uint16), Spec("bfloat16", (1,)), np.dtype("float32"))
    array([1.5], dtype=float32)
    """
    if spec.dtype == "bfloat16":
        bits = piece.astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32).astype(dtype, copy=False)
    return piece.astype(dtype, copy=False)


def narrowed(numbers: Array, spec: Spec) -> Array:
    """Finite numbers in the storage of a tensor, rounded once, to nearest even.

    >>> narrowed(np.float32([1.5]), Spec("bfloat16", (1,)))
    array([16320], dtype=uint16)
    """
    if spec.dtype != "bfloat16":
        return numbers.astype(spec.storage, copy=False)
    bits = numbers.astype(np.float32, copy=False).view(np.uint32)
    # Half of the last bit that stays, less a little where that bit is even.
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
