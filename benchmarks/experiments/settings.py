"""An experiment as its TOML file says it: ``[experiment]`` beside the ``[swa]`` under test."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from swa_core import SWAConfig


@dataclass(frozen=True)
class Experiment:
    """What is trained, the same in every framework.

    Attributes:
      name: of the experiment.
      dataset: "digits", "fashion-mnist" or "cifar10".
      network: a name in ``networks.NETWORKS``, or of the paper's own (torch alone).
      train_images: the first so many of the training set [images].
      test_images: the first so many of the test set [images].
      epochs: one budget [epochs]; what is said to take 1.25 budgets takes a quarter more.
      batch_size: it must divide train_images, so that all updates weigh the same [images].
      rate: the learning rate at first.
      swa_rate: the constant rate from the start of averaging on, reached before it.
      cycle_high, cycle_low: where the cyclical rate begins and ends each epoch.
      momentum: of SGD.
      weight_decay: of SGD, on all weights, as part of the gradient.
      ema_decay: of the exponential moving average, at every update.
      shift: images are shifted at random by up to so many pixels each way.
      flip: whether images are mirrored at random.
      config: the [swa] table: when snapshots are taken; the averages of every arm start there.
    """

    name: str
    dataset: str
    network: str
    train_images: int
    test_images: int
    epochs: int
    batch_size: int
    rate: float
    swa_rate: float
    cycle_high: float
    cycle_low: float
    momentum: float
    weight_decay: float
    ema_decay: float
    shift: int
    flip: bool
    config: SWAConfig

    def __post_init__(self) -> None:
        if self.train_images % self.batch_size:
            raise SystemExit(f"{self.name}: batch_size must divide train_images")
        if self.epochs % 4:
            raise SystemExit(f"{self.name}: epochs must be a multiple of 4, for 1.25 budgets")
        if self.config.lr is not None:
            raise SystemExit(f"{self.name}: the rates are those of [experiment], not of [swa.lr]")

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch."""
        return self.train_images // self.batch_size

    @property
    def start(self) -> int:
        """The epochs that are over at the first snapshot."""
        schedule = self.config.schedule(
            steps_per_epoch=self.steps_per_epoch, total_steps=self.epochs * self.steps_per_epoch
        )
        epochs, rest = divmod(schedule.start, self.steps_per_epoch)
        if rest or epochs < 2:
            raise SystemExit(f"{self.name}: start must be a whole number of epochs, 2 at least")
        return epochs

    def tiny(self) -> Experiment:
        """The same in seconds, on images that need no download: 8 epochs of next to nothing."""
        return replace(
            self, dataset="digits", train_images=2 * self.batch_size, test_images=200, epochs=8
        )

    def to_dict(self) -> dict[str, Any]:
        """All that results depend on, for the cache and for the record."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}
        return {**plain, "swa": self.config.to_dict()}


def load(path: Path) -> Experiment:
    """Reads an experiment.

    Raises:
      SystemExit: it is not there, or a key is unknown, missing or of the wrong type.
      swa_core.ConfigError: the [swa] table is faulty.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["experiment"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise SystemExit(f"{path} is no experiment: {error!r}") from error
    known = {f.name: f.type for f in fields(Experiment) if f.name not in ("name", "config")}
    faults = [f"{key} is unknown" for key in table.keys() - known.keys()]
    faults += [f"{key} is missing" for key in known.keys() - table.keys()]
    for key in known.keys() & table.keys():
        if known[key] == "float" and type(table[key]) is int:
            table[key] = float(table[key])
        if type(table[key]).__name__ != known[key]:
            faults.append(f"{key} = {table[key]!r} should be of type {known[key]}")
    if faults:
        raise SystemExit(f"{path}: " + "; ".join(sorted(faults)))
    return Experiment(name=path.stem, config=SWAConfig.load(path), **table)
