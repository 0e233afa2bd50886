"""Trainings whose weights are known beforehand: what each update leads to is written down.

Optimizers of the trainings assign what they are given as gradients, so that everything around them
is the real thing: the loop, the optimizer's step, the callbacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Bits of the significand, and the least exponent of a number that has them all.
FORMATS = {"float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}
# Three batches, the last one small, and each around a mean of its own along a random direction.
BATCH_SIZES, BATCH_MEANS = (32, 32, 5), (0.0, 0.5, 2.0)


@dataclass(frozen=True)
class Intent:
    """What a user wants of a schedule, in completed updates: the first snapshot, the distance."""

    start: int
    every: int

    def snapshots(self, updates: int) -> list[int]:
        """Those of a training of so many updates.

        >>> Intent(start=10, every=4).snapshots(20)
        [10, 14, 18]
        """
        return list(range(self.start, updates + 1, self.every))


@dataclass(frozen=True)
class Script:
    """The weights of a training.

    Attributes:
      kernel: float64, rounded to ``dtype``, of shape (updates + 1, rows, columns); the first are
        the initial ones.
      bias: the same, of shape (updates + 1, columns).
      dtype: of the weights, as torch and JAX name it.
      counts: an integer buffer of the model, one value for each of the above, or None for none.
      tied: whether the kernel has a second name in the model.
      batch_norm: whether a batch norm without scale and offset follows kernel and bias.
    """

    kernel: Array
    bias: Array
    dtype: str = "float32"
    counts: tuple[int, ...] | None = None
    tied: bool = False
    batch_norm: bool = False

    @property
    def updates(self) -> int:
        """How many there are; initial weights are none."""
        return len(self.kernel) - 1

    def at(self, update: int) -> dict[str, Array]:
        """The weights after so many updates."""
        return {"kernel": self.kernel[update], "bias": self.bias[update]}


def rounded(values: Array, dtype: str) -> Array:
    """``values`` to the nearest that ``dtype`` has, ties to even, in float64.

    >>> rounded(np.array([1 + 2**-8, 1 + 3 * 2**-8]), "bfloat16").tolist()
    [1.0, 1.015625]
    """
    bits, least = FORMATS[dtype]
    _, exponent = np.frexp(values)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, least) - bits + 1)
    return np.rint(values / unit) * unit


def random_walk(updates: int, dtype: str = "float32", *, seed: int = 0, **keywords: Any) -> Script:
    """From weights of size 1 on, in steps that sum to about 1 over 10 000 updates."""
    generator = np.random.default_rng(seed)
    kernel = _walk(generator, updates, (4, 3))
    bias = _walk(generator, updates, (3,))
    return Script(rounded(kernel, dtype), rounded(bias, dtype), dtype, **keywords)


def _walk(generator: np.random.Generator, updates: int, shape: tuple[int, ...]) -> Array:
    start = generator.standard_normal((1, *shape))
    return np.cumsum(np.append(start, 0.01 * generator.standard_normal((updates, *shape)), 0), 0)


def one_hot(updates: int) -> Script:
    """Every update has a place of its own in the kernel, so that an average tells what is in it."""
    return Script(np.eye(updates + 1)[:, :, None], np.zeros((updates + 1, 1)))


def with_nan(updates: int, at: int) -> Script:
    """A walk that is NaN after one update, and finite again after the next."""
    script = random_walk(updates)
    script.kernel[at] = np.nan
    return script


def batches(script: Script) -> list[Array]:
    """Inputs of the model in float32, in ragged batches."""
    generator = np.random.default_rng(1)
    rows = script.kernel.shape[1]
    towards = generator.standard_normal(rows)
    return [
        (mean * towards + generator.standard_normal((size, rows))).astype(np.float32)
        for size, mean in zip(BATCH_SIZES, BATCH_MEANS, strict=True)
    ]


def pooled_statistics(weights: Mapping[str, Array], inputs: list[Array]) -> tuple[Array, Array]:
    """Mean and biased variance of what the batch norm is given, over all inputs, in float64."""
    inputs = np.concatenate(inputs).astype(np.float64)
    values = inputs @ np.asarray(weights["kernel"], np.float64) + weights["bias"]
    return values.mean(0), values.var(0)
