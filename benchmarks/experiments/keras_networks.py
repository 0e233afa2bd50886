"""The networks of the experiments in Keras, on any backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras

from experiments.networks import BN_EPSILON, BN_KEEP, NETWORKS, VGG, PreResNet

Shape = tuple[int, int, int]


class _Body:
    """The layers of a network, in the order in which they are made."""

    def __init__(self) -> None:
        self.made: list[keras.Layer] = []

    def conv(self, x: Any, out: int, size: int, stride: int = 1) -> Any:
        """A convolution with the padding of torch, which is Keras' "same" where the stride is 1."""
        padding = "same"
        if stride > 1:
            padding = "valid"
            x = keras.layers.ZeroPadding2D(size // 2)(x) if size > 1 else x
        layer = keras.layers.Conv2D(out, size, strides=stride, padding=padding, use_bias=False)
        return self._made(layer)(x)

    def norm(self, x: Any) -> Any:
        """A batch norm as all of them are, and ReLU."""
        layer = keras.layers.BatchNormalization(momentum=BN_KEEP, epsilon=BN_EPSILON)
        return keras.layers.ReLU()(self._made(layer)(x))

    def dense(self, x: Any, classes: int) -> Any:
        """The head."""
        return self._made(keras.layers.Dense(classes))(keras.layers.GlobalAveragePooling2D()(x))

    def vgg(self, network: VGG, x: Any) -> Any:
        for stage in network.stages:
            for out in stage:
                x = self.norm(self.conv(x, out, 3))
            x = keras.layers.MaxPooling2D(2)(x)
        return x

    def preresnet(self, network: PreResNet, x: Any) -> Any:
        x = self.conv(x, network.stem, 3, network.stem_stride)
        for out, stride in network.blocks:
            y = self.norm(x)
            inside = self.conv(self.norm(self.conv(y, out, 3, stride)), out, 3)
            if (x.shape[-1], 1) != (out, stride):
                x = self.conv(y, out, 1, stride)
            x = keras.layers.Add()([x, inside])
        return self.norm(x)

    def _made(self, layer: keras.Layer) -> keras.Layer:
        self.made.append(layer)
        return layer


def build(name: str, shape: Shape, classes: int) -> tuple[keras.Model, list[keras.Variable]]:
    """A network without the weights of any seed.

    Args:
      name: of the network.
      shape: of an image: height, width, channels.
      classes: how many there are.

    Returns:
      The model, from images to logits, and its trainable variables in the order of
      ``networks.weights``.
    """
    network, body = NETWORKS[name], _Body()
    inputs = keras.Input(shape)
    grow = body.vgg if isinstance(network, VGG) else body.preresnet
    model = keras.Model(inputs, body.dense(grow(network, inputs), classes))
    return model, list(_variables(body.made))


def _variables(layers: Sequence[keras.Layer]) -> Iterator[keras.Variable]:
    for layer in layers:
        yield from layer.trainable_variables
