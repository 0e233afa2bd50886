"""The demo's table and plot, from the records of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from record import LINE

COLUMNS = ("last", "average", "average + update_bn", "annealed")


def with_error(values: Sequence[float], spec: str) -> str:
    """Mean and standard error of the mean, which a single value tells nothing of.

    >>> with_error([1.0, 3.0], ".1f"), with_error([1.0], "+.2f")
    ('2.0±1.0', '+1.00')
    """
    mean = format(statistics.fmean(values), spec)
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean}±{format(error, spec.lstrip('+'))}"


def table(runs: dict[str, list[dict]]) -> str:
    """A row per framework: snapshots, and accuracy and loss of the four kinds of weights."""
    width = 27
    lines = [
        "",
        "Test accuracy [%] and negative log-likelihood, mean and standard error over the seeds",
        "",
        f"{'':17s} {'snapshots':>9s}  " + "".join(f"{column:>{width}s}" for column in COLUMNS),
    ]
    for name, records in runs.items():
        cells = []
        for column in COLUMNS:
            accuracies, losses = zip(*(record["scores"][column] for record in records), strict=True)
            cells.append(f"{with_error(accuracies, '.2f')} {with_error(losses, '.4f')}")
        count = len(records[0]["snapshots"])
        lines.append(f"{name:17s} {count:>9d}  " + "".join(f"{cell:>{width}s}" for cell in cells))
    return "\n".join([*lines, "", snapshots(runs), *changes(runs)])


def snapshots(runs: dict[str, list[dict]]) -> str:
    """Whether every run took the same snapshots, and which."""
    taken = {name: {tuple(record["snapshots"]) for record in runs[name]} for name in runs}
    if len(set().union(*taken.values())) == 1:
        updates = ", ".join(map(str, next(iter(set().union(*taken.values())))))
        return f"Snapshots are the same in every run, at updates {updates}."
    told = "; ".join(f"{name}: {sorted(found)}" for name, found in taken.items())
    return f"SNAPSHOTS DIFFER: {told}"


def changes(runs: dict[str, list[dict]]) -> list[str]:
    """How the average's loss differs from that of the last weights and of the annealed run.

    The differences are taken seed by seed, since both sides share initialisation and batches.

    >>> scores = [
    ...     {"last": (90, 0.5), "average + update_bn": (95, 0.25), "annealed": (95, 0.25)},
    ...     {"last": (90, 0.5), "average + update_bn": (95, 0.25), "annealed": (95, 0.5)},
    ... ]
    >>> print(*changes({"torch": [{"scores": score} for score in scores]}), sep="\\n")
    torch: average - last = -0.2500±0.0000 nats, lower in 2 of 2 seeds.
    torch: average - annealed = -0.1250±0.1250 nats, lower in 1 of 2 seeds.
    """
    lines = []
    for name, records in runs.items():
        for other in ("last", "annealed"):
            differences = [
                record["scores"]["average + update_bn"][1] - record["scores"][other][1]
                for record in records
            ]
            lower = sum(d < 0 for d in differences)
            lines.append(
                f"{name}: average - {other} = {with_error(differences, '+.4f')} nats, lower in "
                f"{lower} of {len(differences)} seeds."
            )
    return lines


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """Writes the two panels, from the first seed of each framework, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_time, along_line) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for number, (name, (first, *_)) in enumerate(runs.items()):
        colour = f"C{number}"
        epochs = range(1, len(first["last"]) + 1)
        over_time.plot(epochs, first["last"], color=colour, alpha=0.45, label=f"{name}, running")
        averaged = [(e, v) for e, v in zip(epochs, first["average"], strict=True) if v is not None]
        over_time.plot(*zip(*averaged, strict=True), color=colour, lw=2.2, label=f"{name}, average")
        along_line.plot(LINE, first["line"], color=colour, lw=2, label=name)
    over_time.set(
        xlabel="epoch", ylabel="test loss [nats]", yscale="log", title="Over the training"
    )
    along_line.set(
        xlabel="0: last weights, 1: their average",
        ylabel="test loss [nats]",
        title="Along the line from the last weights to the average",
    )
    for place in (0, 1):
        along_line.axvline(place, color="grey", lw=0.8, ls=":")
    for axes in (over_time, along_line):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
