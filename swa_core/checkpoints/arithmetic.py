"""Means of pieces: widened, summed in float32 or wider, divided once, cast once."""

from __future__ import annotations

from collections.abc import Iterable
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


def mean(pieces: Iterable[tuple[Array, float]], spec: Spec, dtype: np.dtype[Any]) -> Array:
    """The weighted mean of one piece of many checkpoints, in ``dtype``.

    Args:
      pieces: with their weights; each is let go before the next one is asked for.
      spec: of the tensor.
      dtype: to sum in.
    """
    total, weights = None, 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told afterwards
        for piece, weight in pieces:
            wide = widened(piece, spec, dtype)
            if weight != 1:
                wide = wide * dtype.type(weight)
            if total is None:
                # Reading hands out memory of its own, but not its dtype.
                total = wide if wide.flags.writeable else wide.copy()
            else:
                np.add(total, wide, out=total)
            weights += weight
        assert total is not None
        result: Array = np.divide(total, dtype.type(weights), out=total)
        return result
