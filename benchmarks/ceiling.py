"""The ceiling: the arithmetic in C, compiled for this machine when the benchmark runs."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = Union[npt.NDArray[Any], "Tensor"]
NAME = "C loop"
SOURCE = Path(__file__).with_name("ceiling.c")
FLAGS = ("-O3", "-march=native", "-pthread", "-shared", "-fPIC")
# The operations of ceiling.c.
LERP = {"float32": 0, "bfloat16": 1}
SWAP = 2


class NoCompilerError(RuntimeError):
    """There is no C compiler, or it could not compile the loop."""


@cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
      NoCompilerError: with what the compiler said.
    """
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise NoCompilerError("no C compiler: neither $CC nor cc")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ceiling.so"
        command = [compiler, *FLAGS, "-o", str(target), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            raise NoCompilerError(f"{' '.join(command[:-3])} failed: {said}") from error
        return ctypes.CDLL(str(target))


def missing() -> str | None:
    """Why the loop cannot run here, or None."""
    try:
        library()
    except NoCompilerError as error:
        return str(error)
    return None


class Pairs:
    """Averages and weights as C knows them: by address.

    Args:
      averages: contiguous float32 arrays: numpy's, or torch tensors on the CPU.
      weights: contiguous arrays of the same sizes, all float32 or all bfloat16.
      threads: how many share the work; as many as the framework beside it uses.
    """

    def __init__(self, averages: Sequence[Array], weights: Sequence[Array], threads: int) -> None:
        (self._dtype,) = {_dtype(weight) for weight in weights}
        if self._dtype not in LERP:
            raise TypeError(f"the C loop reads float32 and bfloat16 weights, not {self._dtype}")
        for average, weight in zip(averages, weights, strict=True):
            assert _dtype(average) == "float32"
            assert _is_contiguous(average)
            assert _is_contiguous(weight)
            assert average.shape == weight.shape
        count = len(weights)
        self._alive = [*averages, *weights]
        starts = [0, *itertools.accumulate(math.prod(weight.shape) for weight in weights)]
        self._arguments = (
            (ctypes.c_void_p * count)(*map(_address, averages)),
            (ctypes.c_void_p * count)(*map(_address, weights)),
            (ctypes.c_long * (count + 1))(*starts),
            ctypes.c_long(count),
        )
        self._threads = ctypes.c_int(threads)
        self._run = library().run

    def lerp(self, mix: float) -> None:
        """``averages += mix * (weights - averages)``."""
        self._run(LERP[self._dtype], *self._arguments, ctypes.c_float(mix), self._threads)

    def swap(self) -> None:
        """Averages and float32 weights change places."""
        assert self._dtype == "float32"
        self._run(SWAP, *self._arguments, ctypes.c_float(), self._threads)


def _address(array: Array) -> int:
    return array.ctypes.data if hasattr(array, "ctypes") else array.data_ptr()


def _dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def _is_contiguous(array: Array) -> bool:
    return array.flags.c_contiguous if hasattr(array, "flags") else array.is_contiguous()
