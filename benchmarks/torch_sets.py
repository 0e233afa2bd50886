"""The weights that are averaged: shapes of known networks, in modules as deep as theirs.

Parameters only. Buffers would cost those contenders more that average them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

Shapes = dict[str, tuple[int, ...]]


def resnet50() -> Shapes:
    """ResNet-50 for 1000 classes (He et al. 2015, arXiv:1512.03385).

    >>> len(resnet50()), elements(resnet50())
    (161, 25557032)
    """
    return dict(_resnet50())


def _resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1.weight", (width, channels, 1, 1)
            yield from norm(f"{name}.bn1", width)
            yield f"{name}.conv2.weight", (width, width, 3, 3)
            yield from norm(f"{name}.bn2", width)
            yield f"{name}.conv3.weight", (4 * width, width, 1, 1)
            yield from norm(f"{name}.bn3", 4 * width)
            if block == 0:
                yield f"{name}.downsample.0.weight", (4 * width, channels, 1, 1)
                yield from norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    yield "fc.weight", (1000, channels)
    yield "fc.bias", (1000,)


def gpt2() -> Shapes:
    """GPT-2 small; the embedding, which is also the output's weight, once.

    >>> len(gpt2()), elements(gpt2())
    (148, 124439808)
    """
    width = 768
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for layer in range(12):
        name = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (width,)
        for linear, (rows, columns) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes[f"{name}.{linear}.weight"] = (rows, columns)
            shapes[f"{name}.{linear}.bias"] = (columns,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    return shapes


def many_small() -> Shapes:
    """2000 tensors of 1000 elements, four to a module.

    >>> len(many_small()), elements(many_small())
    (2000, 2000000)
    """
    return {f"blocks.{n // 4}.weight{n % 4}": (1000,) for n in range(2000)}


SETS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    "2000x1000": many_small,
}


def shapes_of(name: str, *, tiny: bool = False) -> Shapes:
    """The shapes of a set; ``tiny`` keeps their number and limits each dimension to 8."""
    shapes = SETS[name]()
    if tiny:
        shapes = {key: tuple(min(size, 8) for size in shape) for key, shape in shapes.items()}
    return shapes


def elements(shapes: Shapes) -> int:
    """How many elements there are in all."""
    return sum(math.prod(shape) for shape in shapes.values())


def fill(root: torch.nn.Module, shapes: Shapes, dtype: torch.dtype) -> torch.nn.Module:
    """Gives ``root`` a parameter for each shape, in submodules as the dotted names say.

    Values are random and the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        values = torch.randn(shape, generator=generator).to(dtype)
        place.register_parameter(last, torch.nn.Parameter(values))
    return root
