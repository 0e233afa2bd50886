"""The plot of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speed.growth import Curve
from speed.names import is_ours, is_peer

OURS, PEERS = ("#1f5fbf", "#6aa9e9"), ("#c44e52", "#dd8452", "#937860", "#8c8c8c")


def growth(curves: Sequence[Curve], file: Path) -> Path | None:
    """Seconds over weights and over tensors, a row for each framework; None without curves."""
    if not curves:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(curve.part for curve in curves))
    axes = ("weights", "tensors")
    figure, panels = pyplot.subplots(
        len(parts), 2, figsize=(11, 3.4 * len(parts)), squeeze=False, layout="constrained"
    )
    for part, row in zip(parts, panels, strict=True):
        for grows, panel in zip(axes, row, strict=True):
            here = [curve for curve in curves if (curve.part, curve.grows) == (part, grows)]
            _draw(panel, here)
            panel.set_title(f"{part}: {grows}", fontsize=10)
            panel.set_xlabel(f"{grows} (log)")
            panel.set_ylabel("seconds of a snapshot (log)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def _draw(panel, curves: Sequence[Curve]) -> None:
    colors = {True: iter(OURS), False: iter(PEERS)}
    for curve in curves:
        low, middle, high = zip(*curve.seconds, strict=True)
        alone = not is_ours(curve.who) and not is_peer(curve.who)
        color = "black" if alone else next(colors[is_ours(curve.who)], "#8c8c8c")
        fit = "" if curve.exponent is None else f", exponent {curve.exponent.text()}"
        panel.fill_between(curve.sizes, low, high, color=color, alpha=0.15, linewidth=0)
        panel.plot(
            curve.sizes,
            middle,
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.8 if is_ours(curve.who) else 1.1,
            linestyle=":" if alone else "-",
            label=f"{curve.who}{fit}",
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.25, which="major")
    if curves:
        panel.legend(fontsize=6.5, frameon=False, loc="upper left")
