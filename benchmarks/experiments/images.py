"""The images of an experiment, and the order in which every framework sees them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.settings import Experiment

# The loaders are those of the examples.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import data as loaders

Batch = tuple[np.ndarray, np.ndarray]


class Images(NamedTuple):
    """Images in [batch, height, width, channels], float32 and standardised; labels int32."""

    experiment: Experiment
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train_y.max()) + 1

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.train_x.shape[-1]

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """An epoch's batches: a function of seed and epoch alone, whatever was asked before."""
        rng = np.random.default_rng([seed, epoch])
        size = self.experiment.batch_size
        for chosen in rng.permutation(len(self.train_y)).reshape(-1, size):
            yield self._augmented(self.train_x[chosen], rng), self.train_y[chosen]

    def for_bn(self, seed: int) -> list[np.ndarray]:
        """An epoch of images as the network trains on, for batch-norm statistics."""
        return [x for x, _ in self.epoch(seed, 0)]

    def _augmented(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Images shifted and mirrored in place, each for itself."""
        shift = self.experiment.shift
        count, height, width, channels = x.shape
        # Zero is the mean of the standardised images.
        padded = np.zeros((count, height + 2 * shift, width + 2 * shift, channels), x.dtype)
        padded[:, shift : shift + height, shift : shift + width] = x
        corners = rng.integers(0, 2 * shift + 1, (count, 2))
        mirrored = rng.random(count) < (0.5 if self.experiment.flip else 0)
        for image, whole, (down, right), mirror in zip(x, padded, corners, mirrored, strict=True):
            cut = whole[down : down + height, right : right + width]
            image[:] = cut[:, ::-1] if mirror else cut
        return x


def load(
    experiment: Experiment, folder: Path | None, kept: Path, *, held_out: bool = False
) -> Images:
    """The experiment's share of a data set.

    Args:
      experiment: what it is for.
      folder: where the data set is.
      kept: a folder for the share, which is read much faster than the data set.
      held_out: whether training images that the experiment leaves out stand in for the test set.

    Raises:
      SystemExit: the data is not there (the message says how to get it), or is too little.
    """
    train, test = experiment.train_images, experiment.test_images
    share = kept / f"{experiment.dataset}-{train}-{test}{'-held-out' if held_out else ''}.npz"
    if share.exists():
        with np.load(share) as arrays:
            return Images(experiment, **arrays)
    whole = loaders.load(experiment.dataset, folder)
    if held_out:
        whole = whole._replace(test_x=whole.train_x[train:], test_y=whole.train_y[train:])
    if train > len(whole.train_y) or test > len(whole.test_y):
        raise SystemExit(
            f"{experiment.name}: {experiment.dataset} has {len(whole.train_y)} training and "
            f"{len(whole.test_y)} test images; {train} and {test} are asked for"
        )
    arrays = {
        "train_x": whole.train_x[:train],
        "train_y": whole.train_y[:train],
        "test_x": whole.test_x[:test],
        "test_y": whole.test_y[:test],
    }
    kept.mkdir(parents=True, exist_ok=True)
    part = share.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **arrays)
    part.replace(share)
    return Images(experiment, **arrays)
