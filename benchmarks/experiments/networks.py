"""The networks of the experiments as data: each framework builds them, from the same weights.

Convolutions have no bias, and "same" padding as torch has it: one pixel on each side. Batch norm
has epsilon 1e-5, and its running statistics keep .9 of what they were. Both networks end in the
mean over the image and a dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BN_EPSILON = 1e-5
# What running statistics keep of themselves at each batch; torch calls .1 the momentum.
BN_KEEP = 0.9


@dataclass(frozen=True)
class VGG:
    """Simonyan and Zisserman 2014, with batch norm.

    Attributes:
      stages: the channels of the 3 x 3 convolutions, each followed by batch norm and ReLU; a stage
        ends in a 2 x 2 maximum.
    """

    stages: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PreResNet:
    """He et al. 2016, arXiv:1603.05027: batch norm and ReLU before each convolution.

    A block is batch norm, ReLU, 3 x 3 (of the stride), batch norm, ReLU, 3 x 3; where channels or
    size change, the shortcut is a 1 x 1 convolution of what the first ReLU gives. After the last
    block come batch norm and ReLU.

    Attributes:
      stem: channels of the first 3 x 3 convolution.
      stem_stride: its stride.
      blocks: channels and stride of each block.
    """

    stem: int
    stem_stride: int
    blocks: tuple[tuple[int, int], ...]


NETWORKS: dict[str, VGG | PreResNet] = {
    "vgg-small": VGG(((8,), (16,), (32, 32))),
    "preresnet-6": PreResNet(16, 2, ((32, 2), (64, 2))),
}


def weights(name: str, channels: int, classes: int, seed: int) -> list[np.ndarray]:
    """Initial weights, in the order of a forward pass; a shortcut is a block's last.

    Kernels are [height, width, in, out], normal with variance 2 / fan-in (He et al. 2015); each
    batch norm is scale (1) and shift (0) [channels]; the dense layer is a kernel [in, out] with
    variance 1 / fan-in and a bias (0). float32.

    >>> [leaf.shape for leaf in weights("vgg-small", 1, 10, seed=0)][:4]
    [(3, 3, 1, 8), (8,), (8,), (3, 3, 8, 16)]
    """
    rng = np.random.default_rng([seed, 1])
    leaves: list[np.ndarray] = []

    def conv(size: int, into: int, out: int) -> None:
        deviation = np.sqrt(2 / (size * size * into))
        leaves.append(rng.normal(0, deviation, (size, size, into, out)))

    def norm(width: int) -> None:
        leaves.extend([np.ones(width), np.zeros(width)])

    network = NETWORKS[name]
    if isinstance(network, VGG):
        width = channels
        for out in [out for stage in network.stages for out in stage]:
            conv(3, width, out)
            norm(out)
            width = out
    else:
        conv(3, channels, network.stem)
        width = network.stem
        for out, stride in network.blocks:
            norm(width)
            conv(3, width, out)
            norm(out)
            conv(3, out, out)
            if (width, 1) != (out, stride):
                conv(1, width, out)
            width = out
        norm(width)
    leaves.append(rng.normal(0, np.sqrt(1 / width), (width, classes)))
    leaves.append(np.zeros(classes))
    return [leaf.astype(np.float32) for leaf in leaves]
