"""Weighted means of pieces: summed in float32 or wider, divided once, rounded once.

What is summed into and what is read into stays in the processor's cache and is used again for the
next piece: fresh memory would be zeroed by the kernel, page by page, at every read.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Protocol

import numpy as np

from swa_core.checkpoints.arithmetic import narrowed
from swa_core.checkpoints.tensors import Array, Spec

# Elements of a piece: as float32 half a megabyte, of which a few have to fit into the cache of one
# core.
PIECE = 1 << 17


class Room:
    """The memory that one thread works in, from piece to piece.

    >>> room = Room()
    >>> first, again = room.array("total", 3, np.float32), room.array("total", 2, np.uint8)
    >>> np.shares_memory(first, again)
    True
    """

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def array(self, use: str, elements: int, dtype: Any) -> Array:
        """Memory for one use, with what the last one left in it."""
        size = elements * np.dtype(dtype).itemsize
        held = self._held.get(use)
        if held is None or held.nbytes < size:
            held = self._held[use] = np.empty(size, np.uint8)
        return held[:size].view(dtype)


class Sum(Protocol):
    """The weighted sum of one piece of many checkpoints."""

    def space(self) -> Array:
        """Where the next piece may be read to: one-dimensional, in ``Spec.storage``."""

    def add(self, piece: Array, weight: float) -> None:
        """Adds a piece: the very array that ``space()`` gave, which is used up by that, or any
        other of its size and dtype, which stays as it is."""

    def mean(self) -> Array | None:
        """The mean in ``Spec.storage``, in memory of its own; None if it is not finite there. No
        more can be added."""

    def overflows(self) -> bool:
        """After ``mean()``: whether it is finite, and merely too large for ``Spec.dtype``."""


def sum_of(spec: Spec, dtype: np.dtype[Any], elements: int, room: Room) -> Sum:
    """A sum with nothing in it.

    Args:
      spec: of the tensor.
      dtype: to sum in; see ``accumulator``.
      elements: of the piece [>= 1].
      room: of this thread; another sum in it ends this one.

    >>> total = sum_of(Spec("float32", (2,)), np.dtype("float32"), 2, Room())
    >>> total.add(np.float32([1, 2]), 1.0)
    >>> total.add(np.float32([4, 8]), 2.0)
    >>> total.mean()
    array([3., 6.], dtype=float32)
    """
    if spec.dtype == "bfloat16" and dtype == np.float32:
        return _Pairs(elements, room)
    return _Plain(spec, dtype, elements, room)


class _Plain:
    """One number after the other."""

    def __init__(self, spec: Spec, dtype: np.dtype[Any], elements: int, room: Room) -> None:
        self._spec = spec
        self._dtype = dtype
        self._n = elements
        self._room = room
        self._is_wide = spec.dtype != "bfloat16" and spec.storage == dtype
        self._total = room.array("total", elements, dtype)
        self._space: Array | None = None
        self._weights = 0.0
        self._is_empty = True
        self._mean = self._total

    def space(self) -> Array:
        if self._is_empty and self._is_wide:
            return self._total  # the first piece need not be copied
        if self._space is None:
            self._space = self._room.array("read", self._n, self._spec.storage)
        return self._space

    def add(self, piece: Array, weight: float) -> None:
        wide = piece if self._is_wide else self._widened(piece)
        if weight != 1:
            is_own = wide is not piece or piece is self._space or piece is self._total
            out = wide if is_own else self._room.array("wide", self._n, self._dtype)
            wide = np.multiply(wide, self._dtype.type(weight), out=out)
        if not self._is_empty:
            np.add(self._total, wide, out=self._total)
        elif wide is not self._total:
            np.copyto(self._total, wide)
        self._weights += weight
        self._is_empty = False

    def mean(self) -> Array | None:
        # Else the division may take place where the sum is.
        out = np.empty(self._n, self._dtype) if self._is_wide else self._total
        self._mean = np.divide(self._total, self._dtype.type(self._weights), out=out)
        if not _are_below(self._mean, math.inf if self._is_wide else _limit(self._spec.dtype)):
            return None
        return narrowed(self._mean, self._spec)

    def overflows(self) -> bool:
        return _are_below(self._mean, math.inf)

    def _widened(self, piece: Array) -> Array:
        wide = self._room.array("wide", self._n, self._dtype)
        if self._spec.dtype == "bfloat16":
            bits = self._room.array("single", self._n, np.uint32)
            np.copyto(bits, piece)
            np.left_shift(bits, 16, out=bits)
            piece = bits.view(np.float32)
        elif self._spec.dtype == "float16":
            is_single = self._dtype == np.float32
            single = wide if is_single else self._room.array("single", self._n, np.float32)
            # Several times as fast as numpy's conversion. The mode says nothing here: there is
            # an entry for every number of 16 bits.
            piece = np.take(_singles(), piece.view(np.uint16), out=single, mode="wrap")
        if piece is not wide:
            np.copyto(wide, piece)
        return wide


class _Pairs:
    """bfloat16, two to a word of 32 bits: each half becomes a float32 in one operation.

    A bfloat16 is the upper half of a float32. The upper and the lower halves of the words are
    summed apart, and meet in the words of the result.
    """

    _UPPER = np.uint32(0xFFFF0000)
    _HALF = np.uint32(16)

    def __init__(self, elements: int, room: Room) -> None:
        self._n = elements
        n = (elements + 1) // 2
        self._words = room.array("read", n, np.uint32)
        self._halves = self._words.view(np.uint16)
        self._halves[-1] = 0  # where the number of elements is odd, half a word is over
        self._space = self._halves[:elements]
        total = room.array("total", 2 * n, np.float32)
        self._upper, self._lower = total[:n], total[n:]
        self._wide = room.array("wide", n, np.float32)
        self._weights = 0.0
        self._is_empty = True

    def space(self) -> Array:
        return self._space

    def add(self, piece: Array, weight: float) -> None:
        if piece is not self._space:
            np.copyto(self._space, piece)
        for total in (self._upper, self._lower):
            wide = total if self._is_empty else self._wide
            if total is self._upper:
                np.bitwise_and(self._words, self._UPPER, out=wide.view(np.uint32))
            else:
                np.left_shift(self._words, self._HALF, out=wide.view(np.uint32))
            if weight != 1:
                np.multiply(wide, np.float32(weight), out=wide)
            if not self._is_empty:
                np.add(total, wide, out=total)
        self._weights += weight
        self._is_empty = False

    def mean(self) -> Array | None:
        for total in (self._upper, self._lower):
            np.divide(total, np.float32(self._weights), out=total)
            if not _are_below(total, _limit("bfloat16")):
                return None
        result = np.empty(len(self._words), np.uint32)
        upper, lower = self._upper.view(np.uint32), self._lower.view(np.uint32)
        self._round(upper, result)
        self._round(lower, result)
        np.bitwise_and(upper, self._UPPER, out=upper)
        np.right_shift(lower, self._HALF, out=lower)
        return np.bitwise_or(upper, lower, out=result).view(np.uint16)[: self._n]

    def overflows(self) -> bool:
        return _are_below(self._upper, math.inf) and _are_below(self._lower, math.inf)

    def _round(self, bits: Array, scratch: Array) -> None:
        """As in ``narrowed``: the upper halves become the nearest bfloat16."""
        np.right_shift(bits, self._HALF, out=scratch)
        np.bitwise_and(scratch, 1, out=scratch)
        np.add(scratch, 0x7FFF, out=scratch)
        np.add(bits, scratch, out=bits)


@cache
def _singles() -> Array:
    """Every float16 as float32."""
    with np.errstate(invalid="ignore"):  # some NaNs signal
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@cache
def _limit(dtype: str) -> float:
    """The least number that is rounded to infinity: half a last bit above the largest.

    >>> _limit("float16")
    65520.0
    """
    if dtype == "bfloat16":
        return (2 - 2.0**-8) * 2.0**127
    about = np.finfo(dtype)  # of complex, of a part
    if about.dtype.itemsize > 4:
        return math.inf
    return float((2 - 2.0 ** -(about.nmant + 1)) * 2.0 ** (about.maxexp - 1))


def _are_below(numbers: Array, limit: float) -> bool:
    """Whether all are finite and less than that; of complex ones, the parts."""
    if numbers.dtype.kind == "c":
        numbers = numbers.view(numbers.real.dtype)
    # Of NaN both are false.
    return bool(numbers.max() < limit and numbers.min() > -limit)
