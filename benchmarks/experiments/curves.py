"""The test error of running weights and averages over the epochs, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The arms, the weights and how they are drawn.
LINES = (
    ("annealed", "last", "SGD, annealed", {"color": "tab:gray"}),
    ("annealed", "ema", "SGD, annealed, EMA", {"color": "tab:gray", "linestyle": ":"}),
    ("constant", "last", "constant rate", {"color": "tab:blue", "linewidth": 0.8}),
    ("constant", "swa", "SWA, constant", {"color": "tab:blue", "linewidth": 2}),
    ("constant", "ema", "EMA, constant", {"color": "tab:green", "linestyle": ":"}),
    ("cyclical", "last", "cyclical rate", {"color": "tab:orange", "linewidth": 0.8}),
    ("cyclical", "swa", "SWA, cyclical", {"color": "tab:orange", "linewidth": 2}),
)
NAMES = {"torch": "PyTorch", "keras": "Keras", "jax": "JAX"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the curves of the one seed that has them, a panel for each framework."""
    from matplotlib.figure import Figure

    frameworks = results["frameworks"]
    figure = Figure(figsize=(4.2 * len(frameworks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(frameworks), sharey=True, squeeze=False)[0]
    for panel, (framework, seeds) in zip(panels, frameworks.items(), strict=True):
        for arm, weights, label, style in LINES:
            curve = seeds["0"][arm]["curve"]
            points = [(int(epoch), at[weights]) for epoch, at in curve.items() if weights in at]
            if points:
                panel.plot(*zip(*points, strict=True), label=label, **style)
        panel.set_title(NAMES[framework])
        panel.set_xlabel("epoch")
    panels[0].set_ylabel("test error [%], one seed")
    # What rises far above it at a high rate would flatten all the rest.
    best = min(line.get_ydata().min() for panel in panels for line in panel.lines)
    panels[0].set_ylim(0.95 * best, 1.8 * best)
    panels[-1].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
