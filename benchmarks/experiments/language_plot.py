"""The plot of the language model experiment: over the training, the budgets and the rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.language_arms import (
    ARMS,
    CONSTANT_AVERAGED,
    LINEAR,
    SCHEDULE_FREE,
    Arm,
)
from experiments.language_results import Results


def curve(results: Results, arm: Arm, column: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve of an arm's longest training: updates [points], losses [seeds, points].

    Args:
      column: 1 for the last weights, 2 for the average that curves are drawn of.
    """
    longest = results.plan.budgets[-1]
    curves = [results.result(arm, longest, seed)["curve"] for seed in results.seeds]
    updates = np.array([point[0] for point in curves[0]])
    losses = [[np.nan if p[column] is None else p[column] for p in points] for points in curves]
    return updates, np.array(losses, np.float64)


def plot(results: Results, path: Path) -> None:
    """Writes three panels as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_time, over_budgets, over_rates) = pyplot.subplots(1, 3, figsize=(15, 4.6))
    _over_time(results, over_time)
    _over_budgets(results, over_budgets)
    _over_rates(results, over_rates)
    for axes in (over_time, over_budgets, over_rates):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _over_time(results: Results, axes: Any) -> None:
    average = results.plan.curves["average"]
    drawn = (
        ("constant rate, running weights", CONSTANT_AVERAGED, 1, "C0", 0.6),
        (f"constant rate, {average}", CONSTANT_AVERAGED, 2, "C1", 1.0),
        ("linear decay, running weights", LINEAR, 1, "C3", 1.0),
        ("schedule-free", SCHEDULE_FREE, 1, "C5", 1.0),
    )
    lowest, highest = np.inf, -np.inf
    for label, arm, column, colour, alpha in drawn:
        updates, losses = curve(results, arm, column)
        mean = losses.mean(axis=0)
        axes.plot(updates, mean, color=colour, alpha=alpha, label=label)
        axes.fill_between(
            updates, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, lw=0
        )
        # The first steep part would take all of the room.
        settled = losses[:, len(updates) // 4 :]
        lowest, highest = min(lowest, np.nanmin(settled)), max(highest, np.nanmax(settled))
    margin = 0.05 * (highest - lowest)
    axes.set(
        xlabel="update",
        ylabel="test loss [nats per character]",
        ylim=(lowest - margin, highest + margin),
        title="Over the longest training\n(a part of the test text; bands: least to largest seed)",
    )


def _over_budgets(results: Results, axes: Any) -> None:
    budgets = results.plan.budgets
    for number, arm in enumerate(ARMS):
        losses = np.array([results.losses(arm, budget) for budget in budgets])
        axes.errorbar(
            # Beside each other, where they would cover each other.
            np.array(budgets) * (1 + 0.015 * (number - 2.5)),
            losses.mean(axis=1),
            yerr=losses.std(axis=1, ddof=1),
            color=f"C{number}",
            marker="o",
            ms=4,
            capsize=2,
            label=arm.name,
        )
    axes.set(
        xscale="log", xlabel="budget [updates]", title="At the end of each budget\n(mean ± sd)"
    )
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()


def _over_rates(results: Results, axes: Any) -> None:
    for number, arm in enumerate(ARMS):
        found = sorted(results.validation(arm).items())
        rates = [rate for rate, _ in found]
        losses = [np.nan if loss is None else loss for _, loss in found]
        axes.plot(rates, losses, color=f"C{number}", marker="o", ms=4, label=arm.name)
    axes.set(
        xscale="log",
        xlabel="peak rate",
        title="Validation loss of the sweep\n(one seed; averages: the best one)",
    )
