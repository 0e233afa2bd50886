"""The stored results of the language model experiment, and what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from experiments.language_arms import Arm, Choice
from experiments.language_plan import Plan, Run
from experiments.statistics import Paired, paired


@dataclass(frozen=True)
class Results:
    """What was run and what came out.

    Attributes:
      plan: what was run.
      seeds: of the comparison.
      chosen: the rate and the average of each arm, by its name.
      sweep: the trainings that these were chosen by, each with its result.
      runs: those of the comparison.
      about: the command, the text, the machine, the versions.
    """

    plan: Plan
    seeds: list[int]
    chosen: dict[str, Choice]
    sweep: list[tuple[Run, dict[str, Any]]]
    runs: list[tuple[Run, dict[str, Any]]]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; ``from_dict`` reads it back."""
        return {
            "about": self.about,
            "seeds": self.seeds,
            "plan": asdict(self.plan),
            "chosen": {name: asdict(choice) for name, choice in self.chosen.items()},
            "sweep": [{"run": asdict(run), "result": result} for run, result in self.sweep],
            "runs": [{"run": asdict(run), "result": result} for run, result in self.runs],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Results:
        return cls(
            plan=Plan(**stored["plan"]),
            seeds=stored["seeds"],
            chosen={name: Choice(**choice) for name, choice in stored["chosen"].items()},
            sweep=[_run(found) for found in stored["sweep"]],
            runs=[_run(found) for found in stored["runs"]],
            about=stored["about"],
        )

    def result(self, arm: Arm, budget: int, seed: int) -> dict[str, Any]:
        """The one training that an arm's loss at a budget is read from.

        Raises:
          LookupError: there is none, or it has spent more or less than the budget.
        """
        reading = self.chosen[arm.name].reading
        for run, result in self.runs:
            losses = result["losses"].get(str(budget), {})
            if (
                (run.schedule, run.rate, run.seed)
                == (arm.schedule, self.chosen[arm.name].rate, seed)
                and budget in run.budgets
                and reading in losses
            ):
                spent = result["updates"][str(budget)][reading]
                if spent != budget:
                    raise LookupError(f"{arm.name}, seed {seed}: {spent} updates of {budget}")
                return result
        raise LookupError(f"{arm.name}, seed {seed}: no training for a budget of {budget} updates")

    def losses(self, arm: Arm, budget: int, reading: str | None = None) -> list[float]:
        """Test losses by seed [nats per character]: of what was chosen for it, or of another."""
        reading = reading or self.chosen[arm.name].reading
        found = [
            self.result(arm, budget, seed)["losses"][str(budget)][reading] for seed in self.seeds
        ]
        return [float("nan") if loss is None else loss for loss in found]

    def difference(
        self, arm: Arm, other: Arm, budget: int, *, reading: str | None = None
    ) -> Paired:
        """How much higher an arm's loss (or another reading's of it) is, seed by seed."""
        ours, theirs = self.losses(arm, budget, reading), self.losses(other, budget)
        if any(map(math.isnan, ours + theirs)):  # of a training that diverged
            return Paired(math.nan, math.nan, math.nan, math.nan, len(ours))
        return paired(ours, theirs)

    def validation(self, arm: Arm) -> dict[float, float | None]:
        """The least validation loss of an arm at each rate of the sweep."""
        longest = str(self.plan.budgets[-1])
        found: dict[float, float | None] = {}
        for run, result in self.sweep:
            if run.schedule == arm.schedule:
                losses = result["losses"][longest]
                least = [losses[name] for name in arm.readings(self.plan)]
                found[run.rate] = min((loss for loss in least if loss is not None), default=None)
        return found

    def updates_for_all_budgets(self, arm: Arm) -> int:
        """How many updates an arm takes to be had at every budget, each at its own end."""
        budgets = self.plan.budgets
        if arm.every_budget:
            return budgets[-1]
        if arm.schedule == "constant":  # a decay of its own for each, from one training
            return budgets[-1] + sum(map(self.plan.cooldown, budgets[:-1]))
        return sum(budgets)

    def seconds(self) -> float:
        """What all trainings took together."""
        return sum(result["seconds"] for _, result in self._all())

    def _all(self) -> Iterable[tuple[Run, dict[str, Any]]]:
        return [*self.sweep, *self.runs]


def _run(stored: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    run = dict(stored["run"])
    run["budgets"] = tuple(run["budgets"])
    return Run(**run), stored["result"]
