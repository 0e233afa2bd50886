"""The page of the language model experiment, made from its stored results alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from experiments import language_plot
from experiments.language_arms import (
    ARMS,
    CONSTANT,
    CONSTANT_AVERAGED,
    COOLED,
    LINEAR,
    LINEAR_AVERAGED,
    SCHEDULE_FREE,
)
from experiments.language_results import Results
from experiments.language_training import LAST
from experiments.statistics import Paired

# What is asked, each as one arm against another.
QUESTIONS = (
    ("Does an average improve a constant rate?", CONSTANT_AVERAGED, CONSTANT),
    ("Does it replace linear decay?", CONSTANT_AVERAGED, LINEAR),
    ("Does it replace a decay at the end?", CONSTANT_AVERAGED, COOLED),
    ("Does it add to linear decay?", LINEAR_AVERAGED, LINEAR),
    ("Does a decay at the end do what linear decay does?", COOLED, LINEAR),
    ("Does schedule-free do?", SCHEDULE_FREE, LINEAR),
)


def write(results: Results, folder: Path) -> Path:
    """Writes the page and its plot into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    language_plot.plot(results, folder / "language-model.png")
    path = folder / "language-model.md"
    path.write_text(page(results), encoding="utf-8")
    return path


def page(results: Results) -> str:
    """The page in Markdown."""
    sections = (
        "# A small language model: does averaging replace decay?",
        _method(results),
        "![Loss over the training, at each budget, and over the rates tried](language-model.png)",
        "## Does averaging replace decay?",
        "\n\n".join(verdicts(results)),
        "## Test loss at each budget",
        _losses(results),
        "## Differences, seed by seed",
        _differences(results),
        "## Every average",
        _averages(results),
        "## The rates",
        _sweep(results),
        "## What it takes to have every budget",
        _updates(results),
        "## How to run it",
        _provenance(results),
    )
    return "\n\n".join(sections) + "\n"


def _method(results: Results) -> str:
    plan, text = results.plan, results.about["text"]
    network, training, parts = plan.network, plan.training, text["characters"]
    budgets = ", ".join(map(str, plan.budgets))
    averages = "; ".join(plan.averages)
    parameters = results.runs[0][1]["parameters"]
    passes = plan.budgets[-1] * training["batch"] * network["context"] / parts["training"]
    return f"""\
A pre-norm transformer ({network["layers"]} layers, width {network["width"]}, context \
{network["context"]}, {parameters} parameters) learns the characters of CPython's own language \
reference ({text["source"]}; {parts["training"]} characters to train on, {parts["validation"]} to \
choose by, {parts["test"]} to test on, contiguous and in this order). Paragraphs that the topics \
repeat were left out first: of {text["characters before repeats were left out"]} characters \
{sum(parts.values())} are left. AdamW takes batches of {training["batch"]} contexts; the longest \
budget is {passes:.1f} passes over the text. Every arm of a budget makes the same number of \
updates ({budgets}) from the same initial weights on the same batches, after the same warm-up of \
{training["warmup"]} updates, over {len(results.seeds)} seeds.

Along one training `swa_torch.SWA` keeps {len(plan.averages)} averages ({averages}; \
half-lives in updates, a snapshot every 10), from the `[swa]` tables of \
[language.toml](../../benchmarks/experiments/language.toml). The peak rate of every arm, and which \
average it is, was chosen by the validation loss at the longest budget, with one seed of its own, \
out of the same rates; the shorter budgets take what was chosen there. The constant rate with a \
decay at the end goes linearly to zero over the last {100 * training["cooldown"]:.0f} % of the \
budget."""


def verdicts(results: Results) -> list[str]:
    """What the differences say, a sentence or two for each budget, and one on what is beside."""
    said = []
    for budget in results.plan.budgets:
        against = results.difference(CONSTANT_AVERAGED, LINEAR, budget)
        helped = results.difference(CONSTANT_AVERAGED, CONSTANT, budget)
        gap = results.difference(CONSTANT, LINEAR, budget)
        sentence = (
            f"**{budget} updates.** The average of a constant rate is {relation(helped)} the last "
            f"weights of one, and {relation(against)} linear decay: {replaces(against)}."
        )
        if gap.low > 0:
            sentence += (
                f" It closes {-100 * helped.mean / gap.mean:.0f} % of the distance from those last "
                "weights to linear decay."
            )
        # Whose length fits one budget need not fit another.
        chosen = results.chosen[CONSTANT_AVERAGED.name].reading
        names = [chosen, *results.plan.averages]
        best = min(names, key=lambda name: sum(results.losses(CONSTANT_AVERAGED, budget, name)))
        if best != chosen:
            hindsight = results.difference(CONSTANT_AVERAGED, LINEAR, budget, reading=best)
            sentence += (
                f" Which average it is was chosen at {results.plan.budgets[-1]} updates; in "
                f'hindsight, by the test loss itself, "{best}" is the best one here, and '
                f"{relation(hindsight)} linear decay."
            )
        said.append(sentence)
    longest = results.plan.budgets[-1]
    added = results.difference(LINEAR_AVERAGED, LINEAR, longest)
    said.append(
        f"**On top of linear decay** ({longest} updates) the best average is {relation(added)} "
        f"the last weights."
    )
    free = results.difference(SCHEDULE_FREE, LINEAR, longest)
    said.append(
        "**Schedule-free AdamW**, which averages at a constant rate too but takes its gradients "
        f"near the average, is {relation(free)} linear decay ({longest} updates)."
    )
    return said


def relation(difference: Paired) -> str:
    """A difference of losses in words.

    >>> relation(Paired(-0.02, -0.03, -0.01, 0.0078, 8))
    '0.0200 nats below (95 % interval -0.0300 to -0.0100)'
    >>> relation(Paired(0.001, -0.001, 0.003, 0.3, 8))
    'within noise of (+0.0010 nats, 95 % interval -0.0010 to +0.0030)'
    """
    if math.isnan(difference.mean):
        return "not to be compared with (a training diverged)"
    interval = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    if not (difference.low > 0 or difference.high < 0):
        return f"within noise of ({difference.mean:+.4f} nats, {interval})"
    side = "above" if difference.mean > 0 else "below"
    return f"{abs(difference.mean):.4f} nats {side} ({interval})"


def replaces(difference: Paired) -> str:
    """Whether what has this difference to decay replaces it.

    >>> replaces(Paired(0.02, 0.01, 0.03, 0.0078, 8))
    'here averaging does not replace decay'
    >>> replaces(Paired(0.0, -0.01, 0.01, 1.0, 8))
    'here no difference to decay can be seen'
    """
    if difference.low > 0:
        return "here averaging does not replace decay"
    if difference.high < 0:
        return "here averaging does better than decay"
    if math.isnan(difference.mean):
        return "here nothing is to be compared"
    return "here no difference to decay can be seen"


def _losses(results: Results) -> str:
    budgets = results.plan.budgets
    rows = [
        [
            arm.name,
            f"{results.chosen[arm.name].rate:g}",
            results.chosen[arm.name].reading if arm.averaged else "",
            *(_mean(results.losses(arm, budget)) for budget in budgets),
        ]
        for arm in ARMS
    ]
    head = ["", "peak rate", "average chosen", *(f"{budget} updates" for budget in budgets)]
    return f"{_table(head, rows)}\n\nNats per character, mean ± standard deviation over the seeds."


def _differences(results: Results) -> str:
    rows = []
    for question, arm, other in QUESTIONS:
        for budget in results.plan.budgets:
            found = results.difference(arm, other, budget)
            ours, theirs = results.losses(arm, budget), results.losses(other, budget)
            lower = sum(a < b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                [
                    question if budget == results.plan.budgets[0] else "",
                    f"{arm.name}, less {other.name}",
                    str(budget),
                    f"{found.mean:+.4f}",
                    f"{found.low:+.4f} to {found.high:+.4f}",
                    f"{found.p:.4f}",
                    f"{lower} of {found.n}",
                ]
            )
    head = ["", "difference", "updates", "mean", "95 % interval", "p", "seeds in which lower"]
    least = 2 / 2 ** len(results.seeds)
    return (
        f"{_table(head, rows)}\n\nNats per character, negative where the first is better. The "
        "interval is Student's, p of the exact sign-flip test, two-sided: with "
        f"{len(results.seeds)} seeds it cannot be less than {least:.4f}. None is corrected for "
        "how many there are."
    )


def _averages(results: Results) -> str:
    budgets = results.plan.budgets
    rows = []
    for arm in (CONSTANT_AVERAGED, LINEAR_AVERAGED):
        for name in (LAST, *results.plan.averages):
            values = (results.losses(arm, budget, name) for budget in budgets)
            rows.append([arm.schedule if name == LAST else "", name, *map(_mean, values)])
    head = ["rate", "read", *(f"{budget} updates" for budget in budgets)]
    rates = (
        f"the constant rate at {results.chosen[CONSTANT_AVERAGED.name].rate:g}, linear decay from "
        f"{results.chosen[LINEAR_AVERAGED.name].rate:g}"
    )
    return (
        f"{_table(head, rows)}\n\nTest loss, nats per character; {rates}, which is what each was "
        "best averaged at. So last weights stand here beside their averages, and may be worse than "
        "at the rate of their own above."
    )


def _sweep(results: Results) -> str:
    rates = sorted(results.plan.sweep["rates"])
    rows = []
    for arm in ARMS:
        found = results.validation(arm)
        cells = []
        for rate in rates:
            loss = found[rate]
            shown = "diverged" if loss is None else f"{loss:.4f}"
            cells.append(f"**{shown}**" if rate == results.chosen[arm.name].rate else shown)
        rows.append([arm.name, *cells])
    edges = [arm.name for arm in ARMS if results.chosen[arm.name].at_edge]
    edge = (
        f" At the edge of what was tried, so that there may be a better one: {'; '.join(edges)}."
        if edges
        else " No arm's best rate is at the edge of what was tried."
    )
    return (
        f"{_table(['', *(f'{rate:g}' for rate in rates)], rows)}\n\nValidation loss after "
        f"{results.plan.budgets[-1]} updates by peak rate (one seed, "
        f"{results.plan.sweep['seed']}); with an average, of the best one.{edge}"
    )


def _updates(results: Results) -> str:
    longest = results.plan.budgets[-1]
    rows = [
        [arm.name, str(updates), f"{updates / longest:.2f}"]
        for arm in ARMS
        for updates in [results.updates_for_all_budgets(arm)]
    ]
    budgets = ", ".join(map(str, results.plan.budgets))
    return (
        "Linear decay needs to know its end, so a budget is a training of its own. A constant rate "
        "does not: one training, averaged, gives every budget on its way, and may go on. An "
        "average has that over decay, whatever the losses say.\n\n"
        f"{_table(['', f'updates for {budgets}', 'ratio to the longest'], rows)}"
    )


def _provenance(results: Results) -> str:
    about = results.about
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    trainings = len(results.sweep) + len(results.runs)
    return (
        f"```\n{about['command']}\n```\n\n"
        f"{trainings} trainings, {results.seconds() / 60:.0f} minutes of one thread in all, on "
        f"{machine['cpu']}, other work beside it included. Seeds "
        f"{', '.join(map(str, results.seeds))}. Python {machine['python']}, {versions}. The text "
        f"differs from one version of Python to another; this one's sha256 is "
        f"`{about['text']['sha256']}`. All of it: "
        "[language_model.json](../../benchmarks/results/language_model.json)."
    )


def _mean(values: list[float]) -> str:
    """Mean and standard deviation.

    >>> _mean([1.0, 2.0, 3.0]), _mean([1.0, math.nan])
    ('2.0000 ± 1.0000', 'diverged')
    """
    if any(map(math.isnan, values)):
        return "diverged"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown.

    >>> print(_table(["", "b"], [["x", "1"]]))
    |  | b |
    |---|---|
    | x | 1 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
