"""The page says what the results say."""

from __future__ import annotations

import json

import pytest
from experiments import language_arms as arms
from experiments import language_report as report
from experiments.language_results import Results
from experiments.language_training import COOLDOWN, LAST


def made(run, losses):
    """A training's result with these losses by what was read."""
    return {
        "parameters": 100,
        "losses": {str(budget): dict(losses) for budget in run.budgets},
        "updates": {str(budget): dict.fromkeys(losses, budget) for budget in run.budgets},
        "snapshots": {},
        "curve": [[10, 3.0, 2.9], [20, 2.5, 2.4], [40, 2.0, 1.9]] if run.curves else [],
        "seconds": 30.0,
    }


def results_with(plan, *, average, linear, seeds=4):
    """Constant rates end at 2, their averages and linear decay as said, each seed a bit off."""
    averages = dict.fromkeys(plan.averages, average)

    def losses(run):
        off = 0.001 * run.seed if run.seed < 100 else 0
        if run.schedule == "constant":
            found = {LAST: 2.0, COOLDOWN: linear + off} | averages
        elif run.schedule == "linear":
            found = dict.fromkeys([LAST, *plan.averages], linear + off)
        else:
            found = {LAST: average}
        return {name: None if loss is None else loss for name, loss in found.items()}

    sweep = [(run, made(run, losses(run))) for run in arms.sweep_runs(plan)]
    longest = str(plan.budgets[-1])
    chosen = arms.choose(plan, {(r.schedule, r.rate): f["losses"][longest] for r, f in sweep})
    runs = arms.seed_runs(plan, chosen, range(seeds))
    text = {
        "source": "a text",
        "sha256": "0" * 64,
        "characters": {"training": 8000, "validation": 1000, "test": 1000},
        "characters before repeats were left out": 12000,
    }
    machine = {"cpu": "a CPU", "python": "3", "versions": {"torch": "2"}}
    return Results(
        plan=plan,
        seeds=list(range(seeds)),
        chosen=chosen,
        sweep=sweep,
        runs=[(run, made(run, losses(run))) for run in runs],
        about={"command": "python it.py", "text": text, "machine": machine},
    )


def test_what_is_stored_is_read_back(plan):
    results = results_with(plan, average=1.6, linear=1.5)
    stored = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert Results.from_dict(stored) == results


def test_an_average_above_decay_does_not_replace_it(plan):
    page = report.page(results_with(plan, average=1.6, linear=1.5))
    assert page.count("here averaging does not replace decay") == 2
    assert "better than decay" not in page
    # Of .5 - .0015 it closes .4.
    assert page.count("It closes 80 % of the distance") == 2
    # And schedule-free, which ends where the average does.
    assert "0.0985 nats above (95 % interval +0.0964 to +0.1006) linear decay (40 updates)" in page
    assert "0.4000 nats below" in page
    assert "0.0985 nats above (95 % interval +0.0964 to +0.1006)" in page
    assert "| +0.0985 | +0.0964 to +0.1006 | 0.1250 | 0 of 4 |" in page


def test_an_average_below_decay_does_better(plan):
    page = report.page(results_with(plan, average=1.4, linear=1.5))
    assert page.count("here averaging does better than decay") == 2
    assert "does not replace" not in page


def test_what_the_seeds_do_not_tell_apart_is_said_so(plan):
    page = report.page(results_with(plan, average=1.5015, linear=1.5))
    assert page.count("here no difference to decay can be seen") == 2
    assert "within noise of (-0.0000 nats" in page or "within noise of (+0.0000 nats" in page


def test_another_average_that_fits_a_budget_better_is_named_as_hindsight(plan):
    results = results_with(plan, average=1.6, linear=1.5)
    assert "hindsight" not in report.page(results)
    for run, result in results.runs:
        if run.schedule == "constant":
            result["losses"]["20"]["EMA, half-life 30"] = 1.4 + 0.001 * run.seed
    page = report.page(results)
    said = '"EMA, half-life 30" is the best one here, and 0.1000 nats below'
    assert page.count("hindsight") == page.count(said) == 1
    assert page.count("here averaging does not replace decay") == 2


def test_a_seed_that_diverged_is_said(plan):
    results = results_with(plan, average=1.6, linear=1.5)
    for run, result in results.runs:
        if run.schedule == "linear" and run.seed == 2:
            result["losses"][str(run.updates)][LAST] = None
    page = report.page(results)
    assert "| linear decay, last weights | 0.002 |  | diverged | diverged |" in page
    assert page.count("here nothing is to be compared") == 2


def test_a_training_of_another_length_is_not_compared(plan):
    results = results_with(plan, average=1.6, linear=1.5)
    for run, result in results.runs:
        if run.schedule == "constant" and run.seed == 1:
            result["updates"]["40"][COOLDOWN] = 41
    with pytest.raises(LookupError, match="seed 1: 41 updates of 40"):
        report.page(results)


def test_updates_for_every_budget(plan):
    results = results_with(plan, average=1.6, linear=1.5)
    assert results.updates_for_all_budgets(arms.CONSTANT_AVERAGED) == 40
    assert results.updates_for_all_budgets(arms.COOLED) == 40 + 4
    assert results.updates_for_all_budgets(arms.LINEAR) == 20 + 40


def test_the_page_and_its_plot_are_written(plan, tmp_path):
    path = report.write(results_with(plan, average=1.6, linear=1.5), tmp_path / "new")
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert (tmp_path / "new" / "language-model.png").stat().st_size > 10_000
