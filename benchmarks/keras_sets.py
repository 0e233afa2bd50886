"""The weights that are averaged, as Keras variables; and the network that is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
import numpy.typing as npt
from reference import FACTORS, expected_scale

Shapes = list[tuple[int, ...]]


def transformer() -> Shapes:
    """Four blocks of GPT-2 small, without embeddings.

    >>> len(transformer()), elements(transformer())
    (48, 28351488)
    """
    width = 768
    block: Shapes = [(width,)] * 4  # scales and shifts of two norms
    for rows, columns in ((width, 3 * width), (width, width), (width, 4 * width)):
        block += [(rows, columns), (columns,)]
    return 4 * [*block, (4 * width, width), (width,)]


def resnet50() -> Shapes:
    """``keras.applications.ResNet50``, whose convolutions have biases.

    >>> len(resnet50()), elements(resnet50())
    (214, 25583592)
    """
    shapes: Shapes = []

    def convolution(size: int, inputs: int, outputs: int) -> None:
        shapes.append((size, size, inputs, outputs))
        shapes.extend([(outputs,)] * 3)  # its bias, and batch norm

    convolution(7, 3, 64)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            if block == 0:
                convolution(1, channels, 4 * width)
            convolution(1, channels, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            channels = 4 * width
    return [*shapes, (channels, 1000), (1000,)]


SETS: dict[str, Callable[[], Shapes]] = {"transformer": transformer, "resnet50": resnet50}


def shapes_of(name: str, *, tiny: bool = False) -> Shapes:
    """The shapes of a set; ``tiny`` keeps their number and limits each dimension to 8."""
    shapes = SETS[name]()
    return [tuple(min(size, 8) for size in shape) for shape in shapes] if tiny else shapes


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many elements there are in all."""
    return sum(math.prod(shape) for shape in shapes)


class Weighted(keras.Model):
    """A model that is nothing but its weights, with random values."""

    def __init__(self, shapes: Shapes, dtype: str, optimizer: keras.Optimizer | None = None):
        super().__init__()
        rng = np.random.default_rng(0)
        for number, shape in enumerate(shapes):
            variable = self.add_weight(
                name=f"weight_{number}", shape=shape, dtype=dtype, initializer="zeros"
            )
            variable.assign(rng.standard_normal(shape, np.float32))
        self.built = True
        self.compile(optimizer or keras.optimizers.SGD(0.0))
        self.optimizer.build(self.trainable_variables)


class MovingWeights:
    """A model's weights that change by known factors; see ``reference``."""

    def __init__(self, model: keras.Model) -> None:
        self._variables = model.trainable_variables
        self._factors = itertools.cycle(FACTORS)
        self.scales = [1.0]

    def move(self) -> None:
        """The next weights."""
        factor = next(self._factors)
        for variable in self._variables:
            variable.assign(variable * factor)
        self.scales.append(self.scales[-1] * factor)

    def error(
        self, averages: Sequence[npt.NDArray[np.floating]], mix: Callable[[int], float]
    ) -> float:
        """How far averages are from float64 ones: the largest relative error of a variable."""
        scale = expected_scale(self.scales, mix) / self.scales[-1]
        worst = 0.0
        for average, variable in zip(averages, self._variables, strict=True):
            right = host(variable).astype(np.float64) * scale
            wrong = np.linalg.norm(np.float64(average) - right) / np.linalg.norm(right)
            worst = max(worst, float(wrong))
        return worst


def host(variable: keras.Variable) -> npt.NDArray[np.floating]:
    """The values on the host, half precision as float32 (torch has no bfloat16 for numpy)."""
    value = keras.ops.cast(variable.value, "float32")
    return np.array(value.detach() if hasattr(value, "detach") else value)


def network(*, tiny: bool, optimizer: keras.Optimizer) -> keras.Model:
    """Four dense layers, 8.4 M weights in 8 variables, the same values each time."""
    width = 16 if tiny else 1448
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, "tanh") for _ in range(4)]
    model = keras.Sequential([keras.Input((width,)), *layers])
    model.compile(optimizer, "mse")
    return model
