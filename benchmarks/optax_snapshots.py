"""A snapshot alone, in a call of its own: who takes it, and of which tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import ceiling
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from optax_contenders import DECAY, of_ema, of_every
from reference import FACTORS, expected_scale

import swa_optax

CEILING = "C loop"
Arrays = list[jax.Array]


class Weights:
    """So many tensors of one size, that change by known factors; see ``reference``.

    >>> weights = Weights(2, 3, "float32")
    >>> weights.move()
    >>> weights.error([2 * leaf for leaf in weights.arrays], lambda update: 1.0) > 0.5
    True
    """

    def __init__(self, count: int, size: int, dtype: str) -> None:
        rng = np.random.default_rng(0)
        self.arrays: Arrays = [
            jnp.asarray(rng.standard_normal(size, np.float32)).astype(dtype) for _ in range(count)
        ]
        self._factors = itertools.cycle(FACTORS)
        self._moved = jax.jit(lambda arrays, factor: [a * factor.astype(dtype) for a in arrays])
        self.scales = [1.0]

    @property
    def n_bytes(self) -> int:
        """What all of them take."""
        return sum(array.nbytes for array in self.arrays)

    def move(self) -> None:
        """The next weights."""
        factor = next(self._factors)
        self.arrays = jax.block_until_ready(self._moved(self.arrays, jnp.float32(factor)))
        self.scales.append(self.scales[-1] * factor)

    def error(self, averages: Sequence[Any], mix: Callable[[int], float]) -> float:
        """How far averages are from float64 ones: the largest relative error of a tensor."""
        scale = expected_scale(self.scales, mix) / self.scales[-1]
        worst = 0.0
        for average, array in zip(averages, self.arrays, strict=True):
            right = np.asarray(array, np.float64) * scale
            wrong = np.linalg.norm(np.asarray(average, np.float64) - right) / np.linalg.norm(right)
            worst = max(worst, float(wrong))
        return worst


class Running(NamedTuple):
    """An average at work: it takes the weights in and waits, and what it holds."""

    update: Callable[[], object]
    averages: Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Contender:
    """One way to take a snapshot.

    Attributes:
      name: its row in the tables.
      build: makes the average of weights.
      mix: how much an update weighs.
      passes: over what memory it has to go: 3 (reads average and weights, writes the average), or
        4 where it looks at the weights first.
      needs: a package that must be installed.
      dtypes: of weights that it averages in float32.
    """

    name: str
    build: Callable[[Weights], Running]
    mix: Callable[[int], float]
    passes: int = 3
    needs: str = "jax"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None if dtype in self.dtypes else f"averages {dtype} weights in {dtype}"


def c_loop(weights: Weights) -> Running:
    """The arithmetic alone, on arrays of its own."""
    arrays: list[npt.NDArray[Any]] = [np.array(array) for array in weights.arrays]
    averages = [np.zeros(array.shape, np.float32) for array in arrays]
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    pairs, count = ceiling.Pairs(averages, arrays, threads), itertools.count(1)
    return Running(lambda: pairs.lerp(1.0 / next(count)), lambda: averages)


def transformation(nonfinite: str) -> Callable[[Weights], Running]:
    """``swa`` in a step that makes no change, so that nothing else is timed."""
    tx = swa_optax.swa({"start": "1step", "every": "1step", "nonfinite": nonfinite})

    def build(weights: Weights) -> Running:
        unchanged = [None] * len(weights.arrays)
        step = jax.jit(
            lambda state, params: tx.update(unchanged, state, params)[1], donate_argnums=0
        )
        return _running(weights, step, tx.init(weights.arrays), lambda state: state.average)

    return build


def accumulated(nonfinite: str) -> Callable[[Weights], Running]:
    """``accumulate`` in the loop."""

    def build(weights: Weights) -> Running:
        step = partial(swa_optax.accumulate, nonfinite=nonfinite)
        return _running(weights, step, swa_optax.init(weights.arrays), lambda state: state.average)

    return build


def incremental_update(weights: Weights) -> Running:
    """optax' function, compiled and donated."""
    update = partial(optax.incremental_update, step_size=jnp.float32(1 - DECAY))
    step = jax.jit(lambda average, params: update(params, average), donate_argnums=0)
    return _running(weights, step, _copies(weights), lambda average: average)


def eager_incremental_update(weights: Weights) -> Running:
    """optax' function as its name invites to call it."""
    update = partial(optax.incremental_update, step_size=jnp.float32(1 - DECAY))
    return _running(
        weights, lambda average, params: update(params, average), _copies(weights), lambda a: a
    )


def nnx_ema(weights: Weights) -> Running:
    """flax' ``nnx.EMA`` in an ``nnx.jit`` of its own, the average donated."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.List(nnx.Param(array) for array in weights.arrays)

    model = Model()
    ema = nnx.EMA(jax.tree.map(jnp.copy, model), DECAY)
    step = nnx.jit(lambda ema, model: ema.update(model), donate_argnums=0)

    def held() -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(ema.params))

    def update() -> None:
        for variable, array in zip(model.weights, weights.arrays, strict=True):
            variable.set_value(array)
        step(ema, model)
        jax.block_until_ready(held())

    return Running(update, held)


def _copies(weights: Weights) -> Arrays:
    return [jnp.array(array, jnp.float32, copy=True) for array in weights.arrays]


def _running(
    weights: Weights,
    step: Callable[[Any, Arrays], Any],
    state: Any,
    average: Callable[[Any], Sequence[Any]],
) -> Running:
    """A state that a step carries on, from call to call."""
    held = [state]

    def update() -> None:
        held[0] = jax.block_until_ready(step(held[0], weights.arrays))

    return Running(update, lambda: average(held[0]))


CONTENDERS = [
    Contender(CEILING, c_loop, of_every),
    Contender("swa_optax.swa, keep", transformation("keep"), of_every),
    Contender("swa_optax.swa, skip", transformation("skip"), of_every, passes=4),
    Contender("swa_optax.accumulate, keep", accumulated("keep"), of_every),
    Contender("swa_optax.accumulate, skip", accumulated("skip"), of_every, passes=4),
    Contender("optax.incremental_update, jitted", incremental_update, of_ema),
    Contender("optax.incremental_update, eager", eager_incremental_update, of_ema),
    Contender("flax nnx.EMA, jitted", nnx_ema, of_ema, needs="flax", dtypes=("float32",)),
]
