"""What is compared: the arms, the peak rate of each, and the trainings that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.language_plan import Plan, Run, Schedule
from experiments.language_training import COOLDOWN, LAST


@dataclass(frozen=True)
class Arm:
    """A way to spend a budget.

    Attributes:
      name: in tables.
      schedule: of the training.
      averaged: whether it is an average, the best of the plan's, or ``reading`` alone.
      reading: what is evaluated, where no average is.
      every_budget: whether one training serves every budget.
    """

    name: str
    schedule: Schedule
    averaged: bool = False
    reading: str = LAST
    every_budget: bool = True

    def readings(self, plan: Plan) -> list[str]:
        """What it may be evaluated at the end of a budget with."""
        return list(plan.averages) if self.averaged else [self.reading]


CONSTANT = Arm("constant rate, last weights", "constant")
CONSTANT_AVERAGED = Arm("constant rate + average", "constant", averaged=True)
COOLED = Arm("constant rate, decay at the end", "constant", reading=COOLDOWN, every_budget=False)
LINEAR = Arm("linear decay, last weights", "linear", every_budget=False)
LINEAR_AVERAGED = Arm("linear decay + average", "linear", averaged=True, every_budget=False)
SCHEDULE_FREE = Arm("schedule-free AdamW", "schedule-free")
ARMS = (CONSTANT, CONSTANT_AVERAGED, COOLED, LINEAR, LINEAR_AVERAGED, SCHEDULE_FREE)


@dataclass(frozen=True)
class Choice:
    """What an arm was given by the validation loss.

    Attributes:
      rate: the peak.
      reading: the average, or what else is evaluated.
      loss: the validation loss it was chosen by [nats per character].
      at_edge: whether the rate is the least or the largest that was tried.
    """

    rate: float
    reading: str
    loss: float
    at_edge: bool


def sweep_runs(plan: Plan) -> list[Run]:
    """The trainings that the rates are chosen by: as many for every schedule."""
    longest = plan.budgets[-1]
    return [
        Run(
            schedule=schedule,
            rate=rate,
            seed=plan.sweep["seed"],
            updates=longest,
            part="validation",
            budgets=(longest,),
            cooldown=schedule == "constant",
        )
        for schedule in ("constant", "linear", "schedule-free")
        for rate in plan.sweep["rates"]
    ]


def choose(
    plan: Plan, losses: Mapping[tuple[Schedule, float], Mapping[str, float | None]]
) -> dict[str, Choice]:
    """The best rate, and the best average, of each arm.

    Args:
      losses: validation losses at the end of the longest budget, by schedule and rate, and by what
        was read; None where a training diverged.

    Raises:
      RuntimeError: all trainings of an arm diverged.
    """
    rates = sorted(plan.sweep["rates"])
    chosen = {}
    for arm in ARMS:
        tried = [
            (loss, rate, reading)
            for rate in rates
            for reading in arm.readings(plan)
            if (loss := losses[arm.schedule, rate][reading]) is not None
        ]
        if not tried:
            raise RuntimeError(f"{arm.name}: every rate of {rates} diverged. Sweep lower ones.")
        loss, rate, reading = min(tried)
        chosen[arm.name] = Choice(rate, reading, loss, rate in (rates[0], rates[-1]))
    return chosen


def seed_runs(plan: Plan, chosen: Mapping[str, Choice], seeds: Sequence[int]) -> list[Run]:
    """The trainings that the arms are compared by; arms of the same rate share theirs."""
    rates = {arm: chosen[arm.name].rate for arm in ARMS}
    return [run for seed in seeds for run in _runs_of(plan, rates, seed)]


def _runs_of(plan: Plan, rates: Mapping[Arm, float], seed: int) -> list[Run]:
    budgets = tuple(plan.budgets)
    longest = budgets[-1]
    common: dict[str, Any] = {"seed": seed, "part": "test"}
    whole = {"updates": longest, "budgets": budgets, "curves": True, **common}
    constant = sorted({rates[CONSTANT], rates[CONSTANT_AVERAGED], rates[COOLED]})
    linear = sorted({rates[LINEAR], rates[LINEAR_AVERAGED]})
    return [
        *(Run("constant", rate, cooldown=rate == rates[COOLED], **whole) for rate in constant),
        *(
            Run("linear", rate, updates=end, budgets=(end,), curves=end == longest, **common)
            for rate in linear
            for end in budgets
        ),
        Run("schedule-free", rates[SCHEDULE_FREE], **whole),
    ]
