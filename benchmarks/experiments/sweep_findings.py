"""What a sweep of start and every shows, computed from its stored results.

A best cell that is picked by the figures it is reported with looks better than it is. So cells are
chosen on images held out from the training set, and everything is reported on the test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from experiments.statistics import Paired, paired
from experiments.sweep_plan import ANNEALED, Cell

# Which sign of a difference is the better one.
BETTER = {"nll": -1, "accuracy": 1}


@dataclass(frozen=True)
class Sweep:
    """The stored results of one data set, as ``sweep_runs.joined`` made them."""

    result: Mapping[str, Any]

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of all arrays."""
        plan = self.result["plan"]
        return [Cell(start, every) for start in plan["starts"] for every in plan["everies"]]

    @property
    def rates(self) -> list[str]:
        """The names of the learning rates."""
        return list(self.result["plan"]["rates"])

    @property
    def shape(self) -> tuple[int, int]:
        """Starts and everies: the grid that the cells fill row by row."""
        plan = self.result["plan"]
        return len(plan["starts"]), len(plan["everies"])

    @property
    def default(self) -> int:
        """The number of the default cell."""
        return self.cells.index(Cell(*self.result["plan"]["default"]))

    def averages(self, rate: str, metric: str, part: str = "test") -> np.ndarray:
        """The scores of all averages [seeds, cells]."""
        return np.array(self.result["averages"][rate][part][metric])

    def last(self, rate: str, metric: str) -> np.ndarray:
        """The test scores of the last weights [seeds]."""
        return np.array(self.result["last"][rate]["test"][metric])

    def annealed(self, metric: str) -> np.ndarray:
        """The test scores of the last weights of the annealed trainings [seeds]."""
        return self.last(ANNEALED, metric)

    def chosen(self, rate: str, metric: str) -> int:
        """The cell that is best on the held-out images, by the mean over the seeds."""
        means = self.averages(rate, metric, "held_out").mean(axis=0)
        return int(np.argmax(BETTER[metric] * means))

    def against(self, rate: str, metric: str, reference: Sequence[float]) -> list[Paired]:
        """Every cell minus one value per seed, on the test images."""
        return [paired(column, reference) for column in self.averages(rate, metric).T]

    def against_cell(self, rate: str, metric: str, cell: int) -> list[Paired]:
        """Every cell minus one of them, on the test images."""
        return self.against(rate, metric, self.averages(rate, metric)[:, cell])

    def as_good(self, rate: str, metric: str) -> list[bool]:
        """Which cells are not worse than the chosen one beyond noise, on the test images."""
        found = self.against_cell(rate, metric, self.chosen(rate, metric))
        return [not is_worse(difference, metric) for difference in found]

    def regret(self, metric: str, part: str) -> np.ndarray:
        """What each cell loses to the chosen one, by the mean over seeds [rates, cells].

        Positive is worse, for accuracy too.
        """
        rows = []
        for rate in self.rates:
            means = self.averages(rate, metric, part).mean(axis=0)
            rows.append(BETTER[metric] * (means[self.chosen(rate, metric)] - means))
        return np.array(rows)


def is_worse(difference: Paired, metric: str) -> bool:
    """Whether a difference is for the worse, its interval on that side of 0 as a whole.

    >>> is_worse(Paired(0.3, 0.1, 0.5, 0.01, 8), "nll")
    True
    >>> is_worse(Paired(0.3, 0.1, 0.5, 0.01, 8), "accuracy")
    False
    >>> is_worse(Paired(0.3, -0.1, 0.7, 0.2, 8), "nll")
    False
    """
    return min(-BETTER[metric] * end for end in (difference.low, difference.high)) > 0


def steady(sweeps: Sequence[Sweep], metric: str) -> int:
    """The cell that loses least where it loses most, over all data sets and learning rates.

    Chosen on the held-out images. The grids of the data sets must be the same.
    """
    grids = {tuple(sweep.cells) for sweep in sweeps}
    if len(grids) != 1:
        raise SystemExit("the data sets were swept over different grids; run them with one plan.")
    losses = np.concatenate([sweep.regret(metric, "held_out") for sweep in sweeps])
    return int(losses.max(axis=0).argmin())
