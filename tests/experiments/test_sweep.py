"""The sweep of start and every: which snapshots, which means, which cells count as good."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from experiments import sweep_report
from experiments.statistics import Paired
from experiments.sweep_averages import Averages
from experiments.sweep_findings import Sweep, steady
from experiments.sweep_plan import Cell, Plan

STEPS = 100
PLAN = Plan.load()


@pytest.mark.parametrize(
    ("cell", "snapshots"),
    [
        (Cell("75%", "1ep"), [1500, 1600, 1700, 1800, 1900, 2000]),
        (Cell("35%", "5ep"), [700, 1200, 1700]),
        (Cell("95%", "5ep"), [1900]),
        (Cell("95%", "50step"), [1900, 1950, 2000]),
        (Cell("25%", "1step"), list(range(500, 2001))),
    ],
)
def test_snapshots_of_a_cell(cell, snapshots):
    assert list(PLAN.snapshots(cell, STEPS)) == snapshots


def test_averages_are_differences_of_running_sums():
    plan = replace(PLAN, training=replace(PLAN.training, epochs=20))
    steps, total = 6, 120
    everies = ("1step", "5step", "3step", "1ep", "2ep", "5ep")
    plan = replace(plan, everies=everies)
    weights = np.random.default_rng(0).normal(size=(total + 1, 7)).astype(np.float32)
    schedules = {cell: plan.schedule(cell, steps) for cell in plan.cells()}
    averages = Averages(schedules.values(), weights[0], total)
    for update in range(1, total + 1):
        averages.update(weights[update])
    for cell, schedule in schedules.items():
        # The sum of every so-manieth weights, those before the start taken off again.
        phase = schedule.start % schedule.every
        sums = weights[phase :: schedule.every].astype(np.float64).cumsum(axis=0)
        before = schedule.start // schedule.every - 1
        count = len(sums) - 1 - before
        expected = (sums[-1] - sums[before]) / count
        state = averages.states[plan.snapshots(cell, steps)]
        assert state.n_averaged == count
        np.testing.assert_allclose(state.average["weights"], expected, rtol=0, atol=1e-6)


def test_cells_of_the_same_snapshots_share_an_average():
    cells = [Cell("95%", "2ep"), Cell("95%", "5ep")]
    averages = Averages([PLAN.schedule(cell, STEPS) for cell in cells], np.zeros(1), 2000)
    assert list(averages.states) == [range(1900, 1901)]


def test_the_constant_rate_is_constant_wherever_a_cell_averages():
    rates = list(PLAN.learning_rates("constant", STEPS))
    first = min(PLAN.snapshots(cell, STEPS)[0] for cell in PLAN.cells())
    assert set(rates[first - 1 :]) == {PLAN.rates["constant"]["value"]}
    assert rates[0] == PLAN.training.rate


def test_a_plan_without_what_the_report_needs_is_refused():
    with pytest.raises(ValueError, match="default cell"):
        replace(PLAN, starts=("25%",))
    with pytest.raises(ValueError, match="cosine"):
        PLAN.of_rates(["constant"])
    with pytest.raises(SystemExit, match="unknown rate 'cosin'; known are constant"):
        PLAN.of_rates(["cosin"])


def sweep(test, held_out=None, dataset="invented"):
    """A sweep of 2 x 2 cells: ``test`` and ``held_out`` are scores [seeds, 4]."""
    held_out = test if held_out is None else held_out
    plan = Plan(
        training=PLAN.training,
        starts=("25%", "75%"),
        everies=("1step", "1ep"),
        default=Cell("75%", "1ep"),
        rates={name: PLAN.rates[name] for name in ("constant", "cosine")},
    )
    last = {part: {m: [0.5, 0.5, 0.5] for m in ("nll", "accuracy")} for part in ("test",)}
    scores = {"test": test, "held_out": held_out}
    averages = {part: dict.fromkeys(("nll", "accuracy"), values) for part, values in scores.items()}
    return Sweep(
        {
            "command": "",
            "dataset": dataset,
            "seeds": [0, 1, 2],
            "machine": {"cpu": "", "python": "", "versions": {}},
            "plan": asdict(plan),
            "images": {"train": 1, "held_out": 1, "test": 1},
            "steps_per_epoch": 1,
            "n_averaged": [8, 4, 2, 1],
            "last_snapshot": [20, 19, 20, 20],
            "last": dict.fromkeys(plan.rates, last),
            "last + update_bn": dict.fromkeys(plan.rates, last),
            "averages": dict.fromkeys(plan.rates, averages),
        }
    )


# By negative log-likelihood, the second is the best, the third as good within noise, the first
# worse for sure; the fourth is worse by the mean and not for sure.
SCORES = [[0.40, 0.30, 0.31, 0.30], [0.41, 0.30, 0.29, 0.50], [0.42, 0.31, 0.32, 0.31]]


def test_cells_are_marked_by_noise():
    found = sweep(SCORES)
    assert found.cells[found.chosen("constant", "nll")] == ("25%", "1ep")
    assert found.as_good("constant", "nll") == [False, True, True, True]
    # Of accuracy, more is better.
    assert found.cells[found.chosen("constant", "accuracy")] == ("25%", "1step")
    assert found.as_good("constant", "accuracy") == [True, False, False, True]


def test_the_best_is_chosen_on_held_out_images():
    held_out = [[0.3, 0.3, 0.2, 0.3]] * 3
    found = sweep(SCORES, held_out)
    assert found.chosen("constant", "nll") == 2
    # A cell that turns out better on the test images is as good as the chosen one.
    assert found.as_good("constant", "nll")[1]


def test_regret_is_positive_where_a_cell_is_worse():
    found = sweep(SCORES)
    for metric, best in (("nll", 1), ("accuracy", 0)):
        regret = found.regret(metric, "test")
        assert regret.shape == (2, 4)
        assert (regret >= 0).all()
        assert (regret[:, best] == 0).all()


def test_the_steady_cell_has_the_smallest_largest_loss():
    one = sweep([[0.1, 0.2, 0.9, 0.3]] * 3)
    other = sweep([[0.9, 0.2, 0.1, 0.3]] * 3)
    assert steady([one], "nll") == 0
    assert steady([one, other], "nll") == 1


@pytest.mark.parametrize(
    ("found", "metric", "verdict"),
    [
        (Paired(-0.3, -0.5, -0.1, 0.01, 8), "nll", "better"),
        (Paired(-0.3, -0.5, -0.1, 0.01, 8), "accuracy", "worse"),
        (Paired(0.3, 0.1, 0.5, 0.01, 8), "nll", "worse"),
        (Paired(0.3, -0.1, 0.7, 0.03, 8), "nll", "within noise"),
        (Paired(0.0, 0.0, 0.0, 1.0, 8), "accuracy", "within noise"),
    ],
)
def test_words_for_a_difference(found, metric, verdict):
    assert sweep_report.difference(found, metric).startswith(f"{verdict}, ")


def test_the_page_names_the_cells_that_are_as_good():
    found = sweep(SCORES)
    said = "\n".join(sweep_report.findings(found, "constant"))
    assert "As good: 3 of 4 cells (every 1step: start 75%; every 1ep: start 25% to 75%)" in said
    together = sweep_report.together([found, sweep(SCORES[::-1], dataset="another")])
    assert "invented, constant" in together
    assert "another, cosine" in together


def test_a_report_of_nothing_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"Run benchmarks/start_and_every\.py first"):
        sweep_report.write(tmp_path, tmp_path)
