"""The heat maps of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.sweep_findings import BETTER, Sweep
from experiments.sweep_plan import ANNEALED

NAMES = {"nll": "negative log-likelihood [nats]", "accuracy": "accuracy [points]"}
DIGITS = {"nll": 3, "accuracy": 2}
# Written behind the figure of a cell that noise does not tell from the chosen one.
MARK = "•"


def draw(sweep: Sweep, path: Path) -> None:
    """Draws the mean differences of all cells, on the test images.

    A row of panels for each metric, a column for each learning rate. In a cell stands the
    difference to the last weights of the same training, and under it to the annealed training.
    """
    from matplotlib.figure import Figure

    rates = sweep.rates
    figure = Figure(figsize=(4.9 * len(rates), 10.2), layout="constrained")
    panels = figure.subplots(len(BETTER), len(rates), squeeze=False)
    for row, metric in zip(panels, BETTER, strict=True):
        for panel, rate in zip(row, rates, strict=True):
            _panel(panel, sweep, rate, metric)
            panel.set_title(f"{NAMES[metric]}, rate: {rate}", fontsize="medium")
    figure.suptitle(
        f"{sweep.result['dataset']}, test images, means of {len(sweep.result['seeds'])} seeds. "
        "Yellow is better.\n"
        "In each cell: average minus last weights of the same training;\n"
        "below it, minus those of the annealed training.\n"
        f"Solid frame: best on held-out images; {MARK}: not worse than it beyond noise;\n"
        "dashed frame: the default.",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _panel(panel: Any, sweep: Sweep, rate: str, metric: str) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = sweep.shape
    scores = sweep.averages(rate, metric)
    to_last = (scores - sweep.last(rate, metric)[:, None]).mean(axis=0)
    to_annealed = (scores - sweep.annealed(metric)[:, None]).mean(axis=0)
    merit = BETTER[metric] * to_last
    # A few cells are so bad that all others would have one colour.
    lowest, highest = np.quantile(merit, 0.1), merit.max()
    panel.imshow(
        merit.reshape(rows, columns), cmap="viridis", vmin=lowest, vmax=highest, aspect="auto"
    )
    plan = sweep.result["plan"]
    panel.set_xticks(range(columns), plan["everies"], fontsize="small")
    panel.set_yticks(range(rows), plan["starts"], fontsize="small")
    panel.set_xlabel("every")
    panel.set_ylabel("start")
    digits = DIGITS[metric]
    for number, good in enumerate(sweep.as_good(rate, metric)):
        row, column = divmod(number, columns)
        text = f"{to_last[number]:+z.{digits}f}{MARK if good else ''}"
        if rate != ANNEALED:  # the same once more
            text += f"\n{to_annealed[number]:+z.{digits}f}"
        bright = merit[number] > (lowest + highest) / 2
        colour = "black" if bright else "white"
        panel.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    for number, style in ((sweep.chosen(rate, metric), "-"), (sweep.default, "--")):
        row, column = divmod(number, columns)
        place = (column - 0.47, row - 0.45)
        panel.add_patch(
            Rectangle(place, 0.94, 0.9, fill=False, linewidth=2, linestyle=style, edgecolor="red")
        )
