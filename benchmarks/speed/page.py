"""The page of the documentation: all of a run in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from speed import text
from speed.comparing import Comparison
from speed.joining import BEST, Entry
from speed.run import Run

LEGEND = """\
Ratios are medians over the rounds in which everybody ran in turn, with their quartiles in brackets.

- **of plain training**: a train step that averages at every update, to one without averaging: Adam,
  8.4 M float32 weights in four dense layers, batches of 32 (of 8 with optax). In Keras a batch of
  `fit`.
- **of the ceiling**: a snapshot alone, to a loop in C over all cores that does the same arithmetic
  and nothing else; the shapes of ResNet-50 in torch, four blocks of GPT-2 small in Keras, 200 equal
  tensors with optax, 25 to 28 M float32 weights each. Of checkpoints: the whole of averaging
  them, to `cat` of the same files.
- **of the best peer**: the same, to the fastest of the others whose average is kept in float32.
- **holds**, **+ peak**: copies of the weights in float32 that averaging keeps, and that are
  resident besides while an update runs: the kernel's figures from a process of its own (with optax:
  what the compiled step is given, and its temporary buffers; of checkpoints, copies of one).
- **a skipped update**: what an update costs that takes no snapshot, more than the step alone. With
  optax of 200 tensors, where the average that a step is given and gives back is nearly all of it. A
  dash: it has no schedule of its own, or does not average at every update."""


def write(run: Run, file: Path, against: Comparison | None, plot: Path | None) -> None:
    """Writes the page, which shows the plot if there is one beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "# What averaging costs",
        "",
        f"Written by `python benchmarks/{' '.join(run.command)}` on {run.date}, not by hand.",
        "",
        text.conditions(run),
        "",
        "## Side by side",
        "",
        text.joined(run),
        "",
        LEGEND,
        "",
    ]
    if run.curves or run.left_out:
        lines += ["## Growth", ""]
        if plot is not None:
            lines += [f"![Seconds of a snapshot over weights and over tensors]({plot.name})", ""]
        lines += [
            text.growth(run.curves),
            "",
            "Of a snapshot alone: the exponent p of seconds = c size^p, least squares of the",
            "logarithms of the medians; microseconds for each tensor of seconds = a + b tensors,",
            "least squares of relative residuals; with standard errors. 100 tensors while weights",
            "grow, 10 M weights while tensors do.",
            "",
        ]
        if run.left_out:
            lines += ["Left out:", "", *(f"- {why}" for why in run.left_out), ""]
    lines += ["## Since the run before", "", text.comparison(against), ""]
    lines += ["## Everything that was measured", "", *everything(run.entries)]
    lines += ["## How", "", text.parts(run), ""]
    file.write_text("\n".join(line.rstrip() for line in lines), encoding="utf-8")


def everything(entries: Iterable[Entry]) -> list[str]:
    """Every ratio, a table for each of the benchmarks' own."""
    out = []
    for (part, kind, of), group in groupby(entries, key=lambda entry: entry[:3]):
        rows: dict[str, dict[str, str]] = {}
        base = None
        for entry in group:
            rows.setdefault(entry.who, {})[entry.to] = entry.ratio.text()
            base = base if entry.to == BEST else entry.to
        heads = [base, BEST] if base else [BEST]
        cells = [[who, *(to.get(head, text.NONE) for head in heads)] for who, to in rows.items()]
        out += [f"{part}: {kind}, {of}", ""]
        out += [text.table([["", *(f"to {head}" for head in heads)], *cells]), ""]
    return out
