"""When the snapshots of a training fall, at which rate, and what they come to.

swa plan swa.toml --epochs 200 --steps-per-epoch 391 --rate 0.1 --parameters 25.6M
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from swa_core.cli.counting import bytes_of, count, plural, positive
from swa_core.config import SWAConfig
from swa_core.learning_rate import learning_rate
from swa_core.rules import name_of

WIDTH = 64  # columns of the drawing
_BARS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    parser.add_argument("config", help="a TOML or JSON file with a [swa] table")
    parser.add_argument("--epochs", type=positive, required=True)
    parser.add_argument(
        "--steps-per-epoch",
        type=positive,
        required=True,
        help="updates: len(loader) // accumulation",
    )
    parser.add_argument("--rate", type=float, help="the base rate, for [swa.lr] (default: 1)")
    parser.add_argument("--parameters", type=count, help="of the model, such as 25.6M, for memory")
    parser.add_argument("--json", action="store_true", help="for programs to read")


def run(options: argparse.Namespace) -> None:
    """Prints the plan."""
    config = SWAConfig.load(options.config)
    figures = plan(config, options.epochs, options.steps_per_epoch, options.rate)
    if options.parameters is not None:
        figures["memory_bytes"] = 4 * options.parameters
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print(drawn(config, figures, options.config))


def plan(
    config: SWAConfig, epochs: int, steps_per_epoch: int, rate: float | None = None
) -> dict[str, Any]:
    """What a training will come to, as plain numbers.

    Args:
      config: as for the training.
      epochs: of the training.
      steps_per_epoch: updates per epoch.
      rate: the base rate, from which that of ``[swa.lr]`` departs; None where it is not known.

    Raises:
      ConfigError: times that cannot be resolved, or no snapshot can come.

    >>> figures = plan(SWAConfig(), epochs=8, steps_per_epoch=10)
    >>> figures["snapshots"], figures["first"], figures["last"]
    (3, 60, 80)
    """
    total_steps = epochs * steps_per_epoch
    lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    schedule, lr = config.schedule(**lengths), config.lr_schedule(**lengths)
    n = schedule.total(total_steps)
    edges = np.linspace(0, total_steps, WIDTH + 1).round().astype(np.int64)
    rates = None
    if lr is not None:
        # At the end of each column; the first update is 1. What depends on an unknown rate is None.
        base = math.nan if rate is None else rate
        at_ends = (float(learning_rate(int(end), base, lr)) for end in np.maximum(edges[1:], 1))
        rates = [None if math.isnan(value) else value for value in at_ends]
    return {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "schedule": list(schedule),
        "snapshots": n,
        "first": schedule.first,
        "last": schedule.last(total_steps),
        "effective_snapshots": config.rule.effective_snapshots(n),
        "mean_age_updates": config.rule.mean_age(n) * schedule.every,
        "snapshots_by_column": np.diff(schedule.n_snapshots(edges)).tolist(),
        "rate_by_column": rates,
    }


def drawn(config: SWAConfig, figures: dict[str, Any], name: str) -> str:
    """The plan as a person reads it."""
    epochs, steps = figures["epochs"], figures["steps_per_epoch"]
    start, every, stop = figures["schedule"]

    def at(update: int) -> str:
        return f"update {update} (epoch {update / steps:.4g})"

    lines = [
        f"{name}: {name_of(config.rule)}, every {plural(every, 'update')} from {at(start)}"
        + (f" to {at(stop)}" if stop is not None else ""),
        f"{plural(epochs, 'epoch')} of {steps} steps: {figures['total_steps']} updates",
        "",
        f"  {'epoch':10}0{epochs:>{WIDTH - 1}}",
        f"  {'snapshots':10}{bars(figures['snapshots_by_column'])}",
    ]
    if (rates := figures["rate_by_column"]) is not None:
        known = [rate for rate in rates if rate is not None]
        said = f"{min(known):.4g} to {max(known):.4g}" if known else ""
        if len(known) < len(rates):
            said += ("; " if known else "") + "yours where nothing is drawn (--rate)"
        lines += [f"  {'rate':10}{bars([rate or 0 for rate in rates])}", f"  {'':10}{said}"]
    age = figures["mean_age_updates"]
    lines += [
        "",
        f"{plural(figures['snapshots'], 'snapshot')}: the first at {at(figures['first'])}, the "
        f"last at {at(figures['last'])}",
        f"worth {figures['effective_snapshots']:.4g} equally weighted ones; their mean age at the "
        f"last is {age:.4g} updates, {age / steps:.3g} epochs",
    ]
    if "memory_bytes" in figures:
        lines.append(f"the average takes {bytes_of(figures['memory_bytes'])} in float32")
    return "\n".join(lines)


def bars(values: Sequence[float]) -> str:
    """Values as bars: none at 0, the highest at the largest.

    Args:
      values: [>= 0].

    >>> bars([0, 1, 4, 8])
    ' ▁▄█'
    """
    top = max(values, default=0) or 1
    return "".join(_BARS[int(np.ceil(value / top * 8))] for value in values)
