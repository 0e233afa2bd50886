"""Checkpoints to average: of a transformer, which change by known factors, and so their mean.

Doubling and halving is exact in every dtype, so the mean is the first one times a number; see
``reference``. No second pass over all files is needed to know what every result has to be.
"""

from __future__ import annotations

import math
from itertools import cycle, islice
from pathlib import Path

import ml_dtypes
import numpy as np
from reference import FACTORS, expected_scale

from swa_core.safetensors_files import read_header, write

DTYPES = {"float32": np.dtype("f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Of a result that was summed in float32, relative; in bfloat16 half of a last bit is 2**-8.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8 + 1e-6}
WIDTH = 768


def shapes_of(size: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of blocks of a transformer, until they take so many bytes.

    >>> shapes = shapes_of(1_000_000, 4)
    >>> len(shapes), sum(map(math.prod, shapes.values()))
    (12, 7087872)
    """
    d, shapes = WIDTH, {}
    one = {
        "attn.qkv.weight": (d, 3 * d),
        "attn.qkv.bias": (3 * d,),
        "attn.out.weight": (d, d),
        "attn.out.bias": (d,),
        "mlp.up.weight": (d, 4 * d),
        "mlp.up.bias": (4 * d,),
        "mlp.down.weight": (4 * d, d),
        "mlp.down.bias": (d,),
        "norm_1.weight": (d,),
        "norm_1.bias": (d,),
        "norm_2.weight": (d,),
        "norm_2.bias": (d,),
    }
    of_block = itemsize * sum(map(math.prod, one.values()))
    for block in range(max(1, round(size / of_block))):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in one.items()}
    return shapes


def scales(number: int) -> list[float]:
    """Of each checkpoint the factor to the first.

    >>> scales(5)
    [1.0, 2.0, 1.0, 0.5, 1.0]
    """
    found = [1.0]
    for factor in islice(cycle(FACTORS), number - 1):
        found.append(found[-1] * factor)
    return found


def make(folder: Path, number: int, size: int, dtype: str) -> list[Path]:
    """Writes checkpoints.

    Args:
      folder: to write to.
      number: of checkpoints [>= 1].
      size: of each, about [bytes].
      dtype: a key of ``DTYPES``.
    """
    rng = np.random.default_rng(0)
    # Signed, and of the size that weights have.
    first = {
        name: (rng.standard_normal(shape, np.float32) / 32).astype(DTYPES[dtype])
        for name, shape in shapes_of(size, DTYPES[dtype].itemsize).items()
    }
    paths = []
    for place, scale in enumerate(scales(number)):
        path = folder / f"{dtype}-{place}.safetensors"
        write(path, {name: a * a.dtype.type(scale) for name, a in first.items()}, {"format": "pt"})
        paths.append(path)
    return paths


def error(result: Path, paths: list[Path]) -> float:
    """The largest relative error of a result, tensor by tensor; also of names and dtypes.

    Raises:
      AssertionError: it does not hold the tensors of the checkpoints.
    """
    scale = expected_scale([0.0, *scales(len(paths))], lambda update: 1 / update)
    worst = 0.0
    with open(paths[0], "rb") as first, open(result, "rb") as mean:
        entries, _, start = read_header(first, paths[0].name)
        found, _, of_mean = read_header(mean, result.name)
        assert entries.keys() == found.keys(), f"{result} holds other tensors"
        for name, entry in entries.items():
            same = (entry.dtype, entry.shape, entry.is_bfloat16)
            there = found[name]
            assert same == (there.dtype, there.shape, there.is_bfloat16), f"{result}: {name}"
            dtype = DTYPES["bfloat16"] if entry.is_bfloat16 else entry.dtype
            count = math.prod(entry.shape)
            expected = np.fromfile(first, dtype, count, offset=start + entry.begin - first.tell())
            actual = np.fromfile(mean, dtype, count, offset=of_mean + there.begin - mean.tell())
            expected = expected.astype(np.float64) * scale
            off = np.abs(actual.astype(np.float64) - expected)
            worst = max(worst, float((off / np.maximum(np.abs(expected), 1e-30)).max()))
    return worst
