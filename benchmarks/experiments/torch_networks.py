"""The networks of the experiments in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from experiments import paper_networks
from experiments.networks import BN_EPSILON, BN_KEEP, NETWORKS, VGG, PreResNet, weights


def conv(into: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution as all of them are."""
    return nn.Conv2d(into, out, size, stride, padding=size // 2, bias=False)


def norm(width: int) -> nn.BatchNorm2d:
    """A batch norm as all of them are."""
    return nn.BatchNorm2d(width, eps=BN_EPSILON, momentum=1 - BN_KEEP)


class Block(nn.Module):
    """The block of a pre-activation ResNet."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.norm1 = norm(into)
        self.conv1 = conv(into, out, 3, stride)
        self.norm2 = norm(out)
        self.conv2 = conv(out, out, 3)
        self.shortcut = conv(into, out, 1, stride) if (into, 1) != (out, stride) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, into, height, width] to [batch, out, height / stride, width / stride]."""
        y = torch.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return beside + self.conv2(torch.relu(self.norm2(self.conv1(y))))


def _vgg(network: VGG, channels: int) -> Iterator[nn.Module]:
    for stage in network.stages:
        for out in stage:
            yield from (conv(channels, out, 3), norm(out), nn.ReLU())
            channels = out
        yield nn.MaxPool2d(2)


def _preresnet(network: PreResNet, channels: int) -> Iterator[nn.Module]:
    width = network.stem
    yield conv(channels, width, 3, network.stem_stride)
    for out, stride in network.blocks:
        yield Block(width, out, stride)
        width = out
    yield from (norm(width), nn.ReLU())


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """A network that holds the initial weights of a seed."""
    if name in paper_networks.NETWORKS:
        return paper_networks.build(name, channels, classes, seed)
    leaves = weights(name, channels, classes, seed)
    network = NETWORKS[name]
    build_body = _vgg if isinstance(network, VGG) else _preresnet
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(leaves[-2].shape[0], classes)]
    model = nn.Sequential(*build_body(network, channels), *head)
    with torch.no_grad():
        for parameter, leaf in zip(model.parameters(), leaves, strict=True):
            axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
            parameter.copy_(torch.from_numpy(leaf.transpose(axes).copy()))
    return model
