"""Rates are chosen for every arm alike, on a part and with a seed that nothing else has."""

from __future__ import annotations

import pytest
from experiments import language_arms as arms
from experiments.language_training import COOLDOWN, LAST

BEST = {"constant": 0.002, "linear": 0.004, "schedule-free": 0.004}


def losses_of(plan, best):
    """Validation losses that are least at these rates, the averages' by .1 below the last's."""
    found = {}
    for run in arms.sweep_runs(plan):
        far = abs(run.rate - best[run.schedule])
        found[run.schedule, run.rate] = {LAST: 2 + far, COOLDOWN: 1.95 + far} | {
            name: 1.9 + far + number / 1000 for number, name in enumerate(plan.averages)
        }
    return found


@pytest.fixture
def chosen(plan):
    return arms.choose(plan, losses_of(plan, BEST))


def test_the_sweep_is_the_same_for_every_schedule(plan):
    runs = arms.sweep_runs(plan)
    by_schedule = {}
    for run in runs:
        assert (run.updates, run.budgets) == (plan.budgets[-1], (plan.budgets[-1],))
        by_schedule.setdefault(run.schedule, []).append((run.rate, run.seed))
    assert set(by_schedule) == {arm.schedule for arm in arms.ARMS}
    first, *others = by_schedule.values()
    assert all(other == first for other in others)


def test_what_is_reported_was_not_chosen_by(plan, chosen):
    sweep, runs = arms.sweep_runs(plan), arms.seed_runs(plan, chosen, range(8))
    assert {run.part for run in sweep} == {"validation"}
    assert {run.part for run in runs} == {"test"}
    assert not {run.seed for run in sweep} & {run.seed for run in runs}


def test_the_best_rate_and_average_are_chosen_arm_by_arm(plan, chosen):
    first = next(iter(plan.averages))
    found = {name: (choice.rate, choice.reading) for name, choice in chosen.items()}
    assert found == {
        arms.CONSTANT.name: (0.002, LAST),
        arms.CONSTANT_AVERAGED.name: (0.002, first),
        arms.COOLED.name: (0.002, COOLDOWN),
        arms.LINEAR.name: (0.004, LAST),
        arms.LINEAR_AVERAGED.name: (0.004, first),
        arms.SCHEDULE_FREE.name: (0.004, LAST),
    }
    assert all(choice.at_edge for choice in chosen.values())  # of two rates


def test_a_rate_that_diverged_is_not_chosen(plan):
    losses = losses_of(plan, BEST)
    losses["constant", 0.002][LAST] = None
    assert arms.choose(plan, losses)[arms.CONSTANT.name].rate == 0.004
    losses["constant", 0.004][LAST] = None
    with pytest.raises(RuntimeError, match="constant rate, last weights: every rate of"):
        arms.choose(plan, losses)


def test_arms_of_one_rate_share_their_training(plan, chosen):
    runs = arms.seed_runs(plan, chosen, [0])
    assert len(set(runs)) == len(runs)
    found = [(run.schedule, run.rate, run.updates) for run in runs]
    assert found == [
        ("constant", 0.002, 40),
        ("linear", 0.004, 20),
        ("linear", 0.004, 40),
        ("schedule-free", 0.004, 40),
    ]
    assert [run.cooldown for run in runs] == [True, False, False, False]


def test_arms_of_two_rates_have_a_training_each(plan, chosen):
    chosen[arms.CONSTANT.name] = arms.Choice(0.004, LAST, 2.0, False)
    runs = [run for run in arms.seed_runs(plan, chosen, [0]) if run.schedule == "constant"]
    assert [(run.rate, run.cooldown) for run in runs] == [(0.002, True), (0.004, False)]
