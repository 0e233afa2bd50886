"""What the sweep of start and every consists of: trainings, averages, learning rates."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from swa_core import LRSchedule, Schedule, SWAConfig, learning_rate
from swa_core.units import Time

FILE = Path(__file__).parents[1] / "start_and_every.toml"
# The rate whose last weights every average is compared with: what one gets without averaging.
ANNEALED = "cosine"


class Cell(NamedTuple):
    """One average: when it starts and how often it takes a snapshot, as ``[swa]`` says it."""

    start: str
    every: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training but for its rate and its seed; numbers of images are upper bounds.

    Attributes:
      rate: the learning rate at the beginning.
    """

    epochs: int
    batch_size: int
    train_images: int
    held_out: int
    test_images: int
    bn_images: int
    rate: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole sweep.

    Attributes:
      training: what all trainings share.
      starts, everies: rows and columns of the grid.
      default: the cell of ``SWAConfig()``.
      rates: by name, how the learning rate goes: ``start``, ``value``, ``anneal``, ``shape``.
    """

    training: Training
    starts: tuple[str, ...]
    everies: tuple[str, ...]
    default: Cell
    rates: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        if self.default not in self.cells():
            raise ValueError(f"the default cell {tuple(self.default)} is not in the grid; add it.")
        if ANNEALED not in self.rates:
            raise ValueError(f"[rates.{ANNEALED}] is missing, with which all are compared; add it.")

    @classmethod
    def load(cls, path: Path = FILE, *, quick: bool = False) -> Plan:
        """Reads the plan; ``quick`` takes its small sizes.

        >>> len(Plan.load().cells()), len(Plan.load(quick=True).cells())
        (48, 6)
        """
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        small = table["quick"] if quick else {}
        training = table["training"] | small.get("training", {})
        cells = table["cells"] | small.get("cells", {})
        return cls(
            training=Training(**training),
            starts=tuple(cells["start"]),
            everies=tuple(cells["every"]),
            default=Cell(*cells["default"]),
            rates=table["rates"],
        )

    def of_rates(self, names: Sequence[str] | None) -> Plan:
        """The plan with some of its rates only; None for all.

        >>> list(Plan.load().of_rates(["cosine"]).rates)
        ['cosine']
        """
        if names is None:
            return self
        if unknown := set(names) - self.rates.keys():
            raise SystemExit(f"unknown rate {min(unknown)!r}; known are {', '.join(self.rates)}.")
        return replace(self, rates={name: self.rates[name] for name in names})

    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [Cell(start, every) for start in self.starts for every in self.everies]

    def snapshots(self, cell: Cell, steps_per_epoch: int) -> range:
        """The updates whose weights a cell averages.

        >>> plan = Plan.load()
        >>> plan.snapshots(Cell("75%", "2ep"), 100)
        range(1500, 2001, 200)
        """
        return self.schedule(cell, steps_per_epoch).snapshots(self._total(steps_per_epoch))

    def schedule(self, cell: Cell, steps_per_epoch: int) -> Schedule:
        """The schedule of a cell, resolved as in every adapter."""
        config = SWAConfig(start=cell.start, every=cell.every)
        return config.schedule(
            steps_per_epoch=steps_per_epoch, total_steps=self._total(steps_per_epoch)
        )

    def learning_rates(self, name: str, steps_per_epoch: int) -> Iterator[float]:
        """The rate that makes each update, from the first to the last.

        >>> rates = list(Plan.load().learning_rates("constant", 100))
        >>> len(rates), rates[249], round(rates[349], 3), rates[449]
        (2000, 0.1, 0.075, 0.05)
        >>> list(Plan.load().learning_rates("cosine", 100))[-1]
        0.0
        """
        total = self._total(steps_per_epoch)
        said = self.rates[name]
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total}
        resolved = LRSchedule(
            start=Time.parse(said["start"]).updates(**lengths),
            value=said["value"],
            anneal=Time.parse(said["anneal"]).updates(**lengths),
            shape=said["shape"],
        )
        for update in range(1, total + 1):
            yield float(learning_rate(update, self.training.rate, resolved))

    def _total(self, steps_per_epoch: int) -> int:
        return self.training.epochs * steps_per_epoch
