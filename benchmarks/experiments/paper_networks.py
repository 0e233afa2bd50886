"""The networks of Izmailov et al. 2018 for CIFAR's 32 x 32 images, in PyTorch.

As the authors trained them (github.com/timgaripov/swa), but for convolutions in front of batch
norm, which have no bias here, and for the last batch norm of the wide network, whose running
statistics are not those of the last batch alone. The paper's VGG16 has no batch norm; its other
form is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

VGG_STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


class Residual(nn.Module):
    """A block of a pre-activation ResNet: batch norm and ReLU before each of its convolutions.

    Where channels or size change, the shortcut is a 1 x 1 convolution of what goes in.
    """

    def __init__(self, into: int, out: int, stride: int, convolutions: list[nn.Conv2d]):
        super().__init__()
        layers = [(nn.BatchNorm2d(c.in_channels), nn.ReLU(inplace=True), c) for c in convolutions]
        self.inside = nn.Sequential(*[layer for three in layers for layer in three])
        same = (into, 1) == (out, stride)
        self.beside = nn.Identity() if same else _conv(into, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, into, height, width] to [batch, out, height / stride, width / stride]."""
        return self.beside(x) + self.inside(x)


def _conv(into: int, out: int, size: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, stride, padding=size // 2, bias=bias)


def _bottleneck(into: int, width: int, stride: int) -> Residual:
    """He et al. 2016, arXiv:1603.05027."""
    out = 4 * width
    convolutions = [_conv(into, width, 1), _conv(width, width, 3, stride), _conv(width, out, 1)]
    return Residual(into, out, stride, convolutions)


def _wide(factor: int, into: int, width: int, stride: int) -> Residual:
    """Zagoruyko and Komodakis 2016, arXiv:1605.07146, without dropout."""
    out = factor * width
    return Residual(into, out, stride, [_conv(into, out, 3), _conv(out, out, 3, stride)])


def _resnet(
    block: Callable[[int, int, int], Residual],
    widening: int,
    blocks: int,
    initialise: Callable[[torch.Tensor], object],
    channels: int,
    classes: int,
) -> nn.Module:
    """Three stages, of so many blocks each."""

    def layers() -> Iterator[nn.Module]:
        into = 16
        yield _conv(channels, into, 3)
        for width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for stride in (first_stride, *[1] * (blocks - 1)):
                yield block(into, width, stride)
                into = widening * width
        yield from (nn.BatchNorm2d(into), nn.ReLU(inplace=True))
        yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))

    return _initialised(nn.Sequential(*layers()), initialise)


def _vgg16(batch_norm: bool, channels: int, classes: int) -> nn.Module:
    """Simonyan and Zisserman 2014, arXiv:1409.1556, with 512 units where theirs has 4096."""

    def layers() -> Iterator[nn.Module]:
        into = channels
        for stage in VGG_STAGES:
            for out in stage:
                yield _conv(into, out, 3, bias=not batch_norm)
                if batch_norm:
                    yield nn.BatchNorm2d(out)
                yield nn.ReLU(inplace=True)
                into = out
            yield nn.MaxPool2d(2)
        yield nn.Flatten()
        for _ in range(2):
            yield from (nn.Dropout(), nn.Linear(512, 512), nn.ReLU(inplace=True))
        yield nn.Linear(512, classes)

    return _initialised(nn.Sequential(*layers()), _he_by_fan_out)


def _initialised(model: nn.Module, initialise: Callable[[torch.Tensor], object]) -> nn.Module:
    """With kernels and biases of convolutions initialised; all else is as torch has it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            initialise(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


_he_by_fan_out = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_glorot = partial(nn.init.xavier_uniform_, gain=2**0.5)

# From channels and classes.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg16": partial(_vgg16, False),
    "vgg16-bn": partial(_vgg16, True),
    "preresnet-164": partial(_resnet, _bottleneck, 4, 18, _he_by_fan_out),
    "wrn-28-10": partial(_resnet, partial(_wide, 10), 10, 4, _glorot),
}


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """A network with the initial weights of a seed; random numbers elsewhere are not disturbed.

    >>> sum(parameter.numel() for parameter in build("vgg16", 3, 10, seed=0).parameters())
    15245130
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](channels, classes)
