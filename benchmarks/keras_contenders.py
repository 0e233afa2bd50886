"""Who averages weights in Keras: ours, Keras' own, what people write, and the ceiling in C."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import ceiling
import keras
import numpy as np
import numpy.typing as npt
from keras_sets import Weighted, host

from swa_keras import SWA

DECAY = 0.9
NAIVE = "numpy, get_weights"
LOOP = "keras.ops, a loop of assign"
CEILING = "C loop"
EMA = "use_ema, SwapEMAWeights"
Arrays = list[npt.NDArray[Any]]


class Running(NamedTuple):
    """An average at work.

    Attributes:
      update: takes the weights in.
      averages: copies of the averages on the host, in the order of the variables.
      swap_in: puts the averages into the model, None for who has no way of doing so.
      swap_out: puts the weights back.
    """

    update: Callable[[], object]
    averages: Callable[[], Sequence[npt.NDArray[Any]]]
    swap_in: Callable[[], object] | None = None
    swap_out: Callable[[], object] | None = None


@dataclass(frozen=True)
class Contender:
    """One way to average.

    Attributes:
      name: its row in the tables.
      build: makes the average of a model.
      use_ema: whether the optimizer of the model averages, which ours refuses.
    """

    name: str
    build: Callable[[Weighted], Running]
    use_ema: bool = False


def uniform(update: int) -> float:
    """How much update ``update`` (the first is 1) weighs in a mean of all."""
    return 1.0 / update


def threads() -> int:
    """As many as the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def wait_for(model: keras.Model | keras.Optimizer) -> None:
    """Waits until its variables are computed, where calls return before that."""
    if keras.backend.backend() == "jax":
        for variable in model.variables:
            variable.value.block_until_ready()


def c_loop(model: Weighted) -> Running:
    """The arithmetic alone, on arrays of its own beside the model's."""
    half = model.trainable_variables[0].dtype == "bfloat16"
    values = [host(v) for v in model.trainable_variables]
    weights = [value.astype("bfloat16") if half else value for value in values]
    averages = [np.zeros(value.shape, np.float32) for value in values]
    pairs = ceiling.Pairs(averages, weights, threads())
    count = itertools.count(1)

    def update() -> None:
        pairs.lerp(1.0 / next(count))

    swap = None if half else pairs.swap
    return Running(update, lambda: averages, swap, swap)


def ours(nonfinite: str) -> Callable[[Weighted], Running]:
    """The callback in a loop without ``fit``."""

    def build(model: Weighted) -> Running:
        swa = SWA({"start": "1step", "every": "1step", "nonfinite": nonfinite})
        block = ExitStack()

        def update() -> None:
            swa.update(model)
            settle(swa)

        def swap_in() -> None:
            block.enter_context(swa.averaged(model))
            wait_for(model)

        def swap_out() -> None:
            block.close()
            wait_for(model)

        return Running(update, lambda: swa.averaged_weights, swap_in, swap_out)

    return build


def settle(swa: SWA) -> None:
    """Waits until the average is computed, where calls return before that."""
    if keras.backend.backend() == "jax":
        for tensor in swa._average._tensors:
            tensor.block_until_ready()


def naive(model: Weighted) -> Running:
    """What a callback of ten lines does: everything by way of numpy."""
    averages: Arrays = []
    kept: list[Arrays] = []
    count = itertools.count(1)

    def update() -> None:
        mix = 1.0 / next(count)
        weights = model.get_weights()
        if not averages:
            averages.extend(np.array(w, np.float32) for w in weights)
        for average, weight in zip(averages, weights, strict=True):
            average += mix * (np.asarray(weight, np.float32) - average)

    def swap_in() -> None:
        kept.append([np.array(w) for w in model.get_weights()])
        model.set_weights(averages)
        wait_for(model)

    def swap_out() -> None:
        model.set_weights(kept.pop())
        wait_for(model)

    return Running(update, lambda: averages, swap_in, swap_out)


def loop(model: Weighted) -> Running:
    """What stays on the device when it is written with keras.ops, variable by variable."""
    variables = model.trainable_variables
    averages = [
        keras.Variable(keras.ops.zeros(v.shape, "float32"), dtype="float32", trainable=False)
        for v in variables
    ]
    count = itertools.count(1)

    def update() -> None:
        mix = 1.0 / next(count)
        for average, variable in zip(averages, variables, strict=True):
            value = keras.ops.cast(variable.value, "float32")
            value = value.detach() if hasattr(value, "detach") else value
            average.assign(average + mix * (value - average))
        if keras.backend.backend() == "jax":
            for average in averages:
                average.value.block_until_ready()

    return Running(update, lambda: [host(average) for average in averages])


def keras_ema(model: Weighted) -> Running:
    """Keras' own; its update is part of the train step, so only its swap stands alone."""
    callback = keras.callbacks.SwapEMAWeights()
    callback.set_model(model)
    for average, variable in zip(
        model.optimizer._model_variables_moving_average, model.trainable_variables, strict=True
    ):
        average.assign(variable * 2)

    def swap_in() -> None:
        callback.on_test_begin()
        wait_for(model)

    def swap_out() -> None:
        callback.on_test_end()
        wait_for(model)

    def averages() -> Arrays:
        return [host(average) for average in model.optimizer._model_variables_moving_average]

    return Running(lambda: None, averages, swap_in, swap_out)


CONTENDERS = [
    Contender(CEILING, c_loop),
    Contender('swa_keras, nonfinite="keep"', ours("keep")),
    Contender('swa_keras, nonfinite="skip"', ours("skip")),
    Contender(LOOP, loop),
    Contender(NAIVE, naive),
    Contender(EMA, keras_ema, use_ema=True),
]


def by_name(name: str) -> Contender:
    """The contender of this name."""
    (found,) = [contender for contender in CONTENDERS if contender.name == name]
    return found
