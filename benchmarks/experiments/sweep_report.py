"""The page about start and every: text, tables and heat maps, all of it from stored results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.statistics import Paired, paired
from experiments.sweep_findings import BETTER, Sweep, is_worse, steady
from experiments.sweep_maps import DIGITS, MARK, draw
from experiments.sweep_plan import ANNEALED

PAGE = "start-and-every.md"
UNITS = {"nll": "nats", "accuracy": "points"}
SAID = {"nll": "negative log-likelihood", "accuracy": "accuracy"}

HEAD = """\
# When should averaging start, and how often take a snapshot?

Written by `python benchmarks/start_and_every.py --report`, from `benchmarks/results`. All figures,
and the words between them, are computed from there.

Averaging does not touch a training, so one training feeds the averages of all pairs of `start` and
`every`: they are the weights that `swa_core.update` keeps. For each, batch norm is recomputed
(`update_bn`), and it is scored on images that it was not trained on. The learning rates:

{rates}

The best cell is chosen on images held out from the training set, since the best of many by the
test set would look better than it is; all figures are of the test set. Differences are paired by
seed (initial weights and the order of the images are the same for all rates), with 95 % intervals
of Student's t in brackets, none corrected for the number of comparisons. A cell is "as good"
({mark} in the maps) if its difference to the chosen one is not for the worse beyond such an
interval; that does not show that they are equal.
"""
WHY = {
    "constant": "the paper's manner for a start at 25 %: the rate is the same for all cells",
    ANNEALED: "as if nobody meant to average",
    "paper": "the paper's manner for a start at 75 %: earlier starts reach back into higher rates",
}


def write(results: Path, docs: Path) -> Path:
    """Writes the page and the maps of all data sets that have results.

    Raises:
      SystemExit: there are none.
    """
    files = sorted(results.glob("start_and_every-*.json"), reverse=True)
    if not files:
        raise SystemExit(
            f"no start_and_every-*.json in {results}. Run benchmarks/start_and_every.py first."
        )
    sweeps = [Sweep(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    parts = [HEAD.format(rates="\n".join(_rates(sweeps[0])), mark=MARK), together(sweeps)]
    docs.mkdir(parents=True, exist_ok=True)
    for sweep in sweeps:
        name = f"start-and-every-{sweep.result['dataset']}.png"
        draw(sweep, docs / name)
        parts.append(section(sweep, name))
    page = docs / PAGE
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _rates(sweep: Sweep) -> list[str]:
    plan = sweep.result["plan"]
    return [
        f"- **{name}**: {plan['training']['rate']} until {rate['start']} of the training, to "
        f"{rate['value']} over {rate['anneal']} ({rate['shape']}); {WHY.get(name, 'of the plan')}."
        for name, rate in plan["rates"].items()
    ]


def together(sweeps: Sequence[Sweep]) -> str:
    """What holds over all data sets and learning rates."""
    lines = ["## All together", ""]
    for metric in BETTER:
        best = steady(sweeps, metric)
        default = sweeps[0].default
        cell, usual_cell = sweeps[0].cells[best], sweeps[0].cells[default]
        losses = np.concatenate([sweep.regret(metric, "test") for sweep in sweeps])
        steadiest, usual = (losses[:, number].max() for number in (best, default))
        digits, unit = DIGITS[metric], UNITS[metric]
        good = [sweep.as_good(rate, metric) for sweep in sweeps for rate in sweep.rates]
        lines += [
            f"- By {SAID[metric]}: the cell that loses least to the chosen ones where it loses "
            f"most is {_cell(cell)} (chosen on held-out images). On the test images it loses "
            f"{steadiest:z.{digits}f} {unit} at most; the default, {_cell(usual_cell)}"
            f", {usual:z.{digits}f}. As good as the chosen cell for every data set and rate: "
            f"{_named(sweeps[0], np.all(good, axis=0))}."
        ]
    lines += ["", *_table_of_defaults(sweeps), "", *_tables_through_default(sweeps)]
    return "\n".join(lines) + "\n"


def section(sweep: Sweep, picture: str) -> str:
    """One data set: what was run, what was found for each rate, and the maps."""
    result = sweep.result
    training, machine, images = result["plan"]["training"], result["machine"], result["images"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"## {result['dataset']}",
        "",
        f"`{result['command']}`; seeds {', '.join(map(str, result['seeds']))}; {machine['cpu']}, "
        f"one thread, Python {machine['python']}, {versions}. Three convolutions with batch norm; "
        f"{images['train']} training images without augmentation, {images['held_out']} held out, "
        f"{images['test']} test images; {training['epochs']} epochs of "
        f"{result['steps_per_epoch']} updates, batches of {training['batch_size']}, rate "
        f"{training['rate']} at first, momentum {training['momentum']}, weight decay "
        f"{training['weight_decay']}.",
        "",
    ]
    for rate in sweep.rates:
        lines += [f"**{rate}**", "", *(f"- {line}" for line in findings(sweep, rate)), ""]
    lines += [f"![Heat maps of all cells]({picture})", ""]
    lines += [
        "Snapshots in the average (the last is at the end, where nothing else is said):",
        "",
        *_counts(sweep),
    ]
    return "\n".join(lines) + "\n"


def findings(sweep: Sweep, rate: str) -> list[str]:
    """What one learning rate shows, a sentence or two for each metric."""
    recomputed = sweep.result["last + update_bn"][rate]["test"]["nll"]
    alone = paired(recomputed, sweep.last(rate, "nll"))
    lines = [
        f"Last weights: {sweep.last(rate, 'nll').mean():.3f} nats, "
        f"{sweep.last(rate, 'accuracy').mean():.2f} %. Recomputing their batch norm alone: "
        f"{difference(alone, 'nll')}."
    ]
    for metric in BETTER:
        chosen = sweep.chosen(rate, metric)
        scores = sweep.averages(rate, metric)[:, chosen]
        to_default = sweep.against_cell(rate, metric, chosen)[sweep.default]
        gain = difference(paired(scores, sweep.last(rate, metric)), metric)
        if rate != ANNEALED:
            annealed = difference(paired(scores, sweep.annealed(metric)), metric)
            gain += f"; against the annealed training {annealed}"
        lines.append(
            f"By {SAID[metric]}: chosen {_cell(sweep.cells[chosen])}; against the last weights "
            f"{gain}. {_as_good(sweep, rate, metric)} The default against the chosen cell: "
            f"{difference(to_default, metric)}."
        )
    return lines


def _as_good(sweep: Sweep, rate: str, metric: str) -> str:
    good = sweep.as_good(rate, metric)
    return f"As good: {sum(good)} of {len(good)} cells ({_named(sweep, good)})."


def _named(sweep: Sweep, chosen: Sequence[bool]) -> str:
    """The chosen cells, by every."""
    plan = sweep.result["plan"]
    ways = []
    for every in plan["everies"]:
        starts = [
            cell.start
            for cell, is_chosen in zip(sweep.cells, chosen, strict=True)
            if is_chosen and cell.every == every
        ]
        if starts:
            ways.append(f"every {every}: start {_span(starts, plan['starts'])}")
    return "; ".join(ways) or "none"


def _span(some: Sequence[str], every: Sequence[str]) -> str:
    """Names the values; a run of neighbours by its ends.

    >>> _span(["25%", "35%", "45%", "75%"], ["25%", "35%", "45%", "55%", "65%", "75%"])
    '25% to 45%, 75%'
    """
    runs: list[list[int]] = []
    for place in sorted(every.index(value) for value in some):
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(
        every[run[0]] if len(run) == 1 else f"{every[run[0]]} to {every[run[-1]]}" for run in runs
    )


def _table_of_defaults(sweeps: Sequence[Sweep]) -> list[str]:
    lines = [
        "What the default is worth, and what is lost with it (bold: not noise):",
        "",
        "| data set, rate | metric | against the last weights | against the annealed training | "
        "against the chosen cell |",
        "|---|---|---|---|---|",
    ]
    for sweep in sweeps:
        for rate in sweep.rates:
            for metric in BETTER:
                scores = sweep.averages(rate, metric)[:, sweep.default]
                references = [sweep.last(rate, metric)]
                references += [] if rate == ANNEALED else [sweep.annealed(metric)]
                found = [_short(paired(scores, reference), metric) for reference in references]
                found += ["as before"] if rate == ANNEALED else []
                chosen = sweep.chosen(rate, metric)
                lost = sweep.against_cell(rate, metric, chosen)[sweep.default]
                cells = [*found, f"{_short(lost, metric)}, {_cell(sweep.cells[chosen])}"]
                lines.append(
                    f"| {sweep.result['dataset']}, {rate} | {metric} | {' | '.join(cells)} |"
                )
    return lines


def _tables_through_default(sweeps: Sequence[Sweep]) -> list[str]:
    """The row and the column of the default: what changing one of the two does."""
    plan = sweeps[0].result["plan"]
    start, every = plan["default"]
    lines = []
    for what, values, varied in (
        (f"Another `every` than {every}, from {start}", plan["everies"], 1),
        (f"Another `start` than {start}, every {every}", plan["starts"], 0),
    ):
        others = [value for value in values if value != plan["default"][varied]]
        lines += [
            f"{what}: difference to the default in negative log-likelihood (bold: not noise).",
            "",
            "| data set, rate | " + " | ".join(others) + " |",
            "|---|" + "---|" * len(others),
        ]
        for sweep in sweeps:
            for rate in sweep.rates:
                to_default = dict(
                    zip(
                        sweep.cells,
                        sweep.against_cell(rate, "nll", sweep.default),
                        strict=True,
                    )
                )
                found = [
                    _short(to_default[(value, every) if varied == 0 else (start, value)], "nll")
                    for value in others
                ]
                lines.append(f"| {sweep.result['dataset']}, {rate} | {' | '.join(found)} |")
        lines.append("")
    return lines


def _counts(sweep: Sweep) -> list[str]:
    result = sweep.result
    plan = result["plan"]
    total = plan["training"]["epochs"] * result["steps_per_epoch"]
    counts = [
        f"{count}" if last == total else f"{count}, the last at {100 * last / total:.0f} %"
        for count, last in zip(result["n_averaged"], result["last_snapshot"], strict=True)
    ]
    lines = ["| start, every | " + " | ".join(plan["everies"]) + " |"]
    lines.append("|---|" + "---|" * len(plan["everies"]))
    for start, row in zip(plan["starts"], np.reshape(counts, sweep.shape), strict=True):
        lines.append(f"| {start} | " + " | ".join(row) + " |")
    return lines


def _cell(cell: Sequence[str]) -> str:
    start, every = cell
    return f"start {start}, every {every}"


def difference(found: Paired, metric: str) -> str:
    """A difference in words and figures."""
    if found.low <= 0 <= found.high:
        verdict = "within noise"
    else:
        verdict = "worse" if is_worse(found, metric) else "better"
    return f"{verdict}, {_figures(found, metric)} {UNITS[metric]}"


def _short(found: Paired, metric: str) -> str:
    text = _figures(found, metric)
    return text if found.low <= 0 <= found.high else f"**{text}**"


def _figures(found: Paired, metric: str) -> str:
    digits = DIGITS[metric] + (metric == "nll")
    low, high = f"{found.low:+z.{digits}f}", f"{found.high:+z.{digits}f}"
    return f"{found.mean:+z.{digits}f} [{low}, {high}]"
