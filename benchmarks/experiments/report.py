"""What came out, as tables: all of it computed from the stored results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import curves
from experiments.networks import NETWORKS
from experiments.statistics import Paired, paired

Results = Mapping[str, Any]
MEASURES = {"accuracy": "accuracy [%]", "nll": "negative log-likelihood", "ece": "ECE [%]"}
NAMES = {"torch": "PyTorch", "keras": "Keras", "jax": "JAX"}

# Izmailov et al. 2018, table 1: CIFAR-10 test accuracy [%], mean and deviation of three runs.
PAPER = """\
| CIFAR-10, accuracy [%] (budget) | SGD | SWA, 1 budget | 1.25 budgets | 1.5 budgets |
|---|---|---|---|---|
| VGG-16 (200 epochs) | 93.25 ± .16 | 93.59 ± .16 | 93.70 ± .22 | 93.64 ± .18 |
| PreResNet-164 (150 epochs) | 95.28 ± .10 | 95.56 ± .11 | 95.77 ± .04 | 95.83 ± .03 |
| WRN-28-10 (200 epochs) | 96.18 ± .11 | 96.45 ± .11 | 96.64 ± .08 | 96.79 ± .05 |
"""


FULL = """\
The network and its settings are the authors', but for batches that divide the training set and
what is said in the TOML file; the paper has three runs, and no annealed SGD at 1.25 budgets."""
SMALL = """\
What can be compared: the method (schedules, snapshots, `update_bn`, budgets) and the signs of the
differences. What cannot: the figures. The networks here are much smaller, see a fraction of the
images and a tenth of the epochs; the paper has three runs, and no annealed SGD at 1.25 budgets."""


class Method(NamedTuple):
    """A row of the table: which arm, after how many budgets, which weights."""

    name: str
    arm: str
    budgets: float
    weights: str


SGD = Method("SGD, annealed", "annealed", 1, "last")
SGD_LONGER = Method("SGD, annealed, 1.25 budgets", "annealed 1.25", 1.25, "last")
SGD_EMA = Method("SGD, annealed, EMA + update_bn", "annealed", 1, "ema + update_bn")
CONSTANT = Method("constant rate, last weights", "constant", 1, "last")
SWA_STALE = Method("SWA, constant, batch norm not recomputed", "constant", 1, "swa")
SWA = Method("SWA, constant + update_bn", "constant", 1, "swa + update_bn")
EMA = Method("EMA, constant + update_bn", "constant", 1, "ema + update_bn")
CYCLICAL = Method("SWA, cyclical + update_bn", "cyclical", 1, "swa + update_bn")
LONGER = Method("SWA, constant, 1.25 budgets + update_bn", "constant", 1.25, "swa + update_bn")

METHODS = (
    SGD,
    Method("SGD, annealed, EMA, batch norm not recomputed", "annealed", 1, "ema"),
    SGD_EMA,
    SGD_LONGER,
    CONSTANT,
    SWA_STALE,
    SWA,
    Method("EMA, constant, batch norm not recomputed", "constant", 1, "ema"),
    EMA,
    Method("cyclical rate, last weights", "cyclical", 1, "last"),
    Method("SWA, cyclical, batch norm not recomputed", "cyclical", 1, "swa"),
    CYCLICAL,
    Method("constant rate, last weights, 1.25 budgets", "constant", 1.25, "last"),
    LONGER,
)
COMPARISONS = (
    ("SWA against its own last weights", SWA, CONSTANT),
    ("update_bn against none", SWA, SWA_STALE),
    ("SWA against annealed SGD, equal budget", SWA, SGD),
    ("SWA cyclical against annealed SGD, equal budget", CYCLICAL, SGD),
    ("SWA at 1.25 budgets against annealed SGD at 1", LONGER, SGD),
    ("SWA against annealed SGD, both at 1.25 budgets", LONGER, SGD_LONGER),
    ("SWA cyclical against constant", CYCLICAL, SWA),
    ("SWA against EMA, constant rate", SWA, EMA),
    ("EMA, constant rate, against annealed SGD, equal budget", EMA, SGD),
    ("EMA of annealed SGD against its last weights", SGD_EMA, SGD),
)


def values(results: Results, framework: str, method: Method, measure: str) -> list[float]:
    """One value per seed, in the order of the seeds."""
    epoch = str(int(results["experiment"]["epochs"] * method.budgets))
    seeds = results["frameworks"][framework]
    return [
        seeds[str(seed)][method.arm]["scores"][epoch][method.weights][measure]
        for seed in results["seeds"]
    ]


def scores(results: Results, framework: str) -> str:
    """All methods: mean and standard deviation over the seeds."""
    lines = [f"| {NAMES[framework]} | " + " | ".join(MEASURES.values()) + " |", "|---|---|---|---|"]
    for method in METHODS:
        cells = []
        for measure in MEASURES:
            found = values(results, framework, method, measure)
            digits = 4 if measure == "nll" else 2
            cells.append(f"{np.mean(found):.{digits}f} ± {np.std(found, ddof=1):.{digits}f}")
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(results: Results, measure: str) -> str:
    """All comparisons in all frameworks, paired by seed."""
    names = list(results["frameworks"])
    lines = [
        f"| difference in {MEASURES[measure]} | "
        + " | ".join(NAMES[name] for name in names)
        + " |",
        "|---|" + "---|" * len(names),
    ]
    for title, first, second in COMPARISONS:
        cells = [_cell(compare(results, name, first, second, measure)) for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(
    results: Results, framework: str, first: Method, second: Method, measure: str
) -> Paired:
    """Two methods by their seeds."""
    return paired(
        values(results, framework, first, measure), values(results, framework, second, measure)
    )


def _cell(found: Paired) -> str:
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p = {found.p:.3f}"
    # Where the interval covers 0, nothing is said to differ.
    return text if found.low <= 0 <= found.high else f"**{text}**"


def agreement(results: Results) -> str:
    """Whether the frameworks took the same snapshots, and whether their effects agree."""
    frameworks = results["frameworks"]
    taken = {
        name: [
            seeds[str(seed)][arm]["snapshots"]
            for seed in results["seeds"]
            for arm in ("constant", "cyclical")
        ]
        for name, seeds in frameworks.items()
    }
    first = next(iter(taken.values()))
    same = all(each == first for each in taken.values())
    alike = all(each == first[0] for each in first[::2])
    lines = [
        f"Snapshots at a constant rate: updates {', '.join(map(str, first[0]['swa']))}; "
        + ("the same in every framework and seed." if same and alike else "**they differ**.")
    ]
    names = list(frameworks)
    if len(names) == 1:
        return "\n".join([*lines, f"Of {NAMES[names[0]]} alone: there is nothing to compare yet."])
    for title, one, other in COMPARISONS:
        effects = {name: compare(results, name, one, other, "nll") for name in names}
        sure = [name for name in names if not effects[name].low <= 0 <= effects[name].high]
        signs = {np.sign(effects[name].mean) for name in sure}
        overlap = max(e.low for e in effects.values()) <= min(e.high for e in effects.values())
        if not sure:
            what = "within noise in every one"
        elif len(signs) > 1:
            what = "**of different signs**"
        elif len(sure) == len(names):
            what = "of the same sign in all"
        else:
            what = f"clear in {', '.join(NAMES[name] for name in sure)} alone"
        lines.append(
            f"- {title}: {what}; the intervals {'overlap' if overlap else '**do not overlap**'}."
        )
    return "\n".join(lines)


def write(results: Results, docs: Path) -> str:
    """Writes the page of an experiment and its curves; returns the page."""
    experiment = results["experiment"]
    name = experiment["name"]
    docs.mkdir(parents=True, exist_ok=True)
    curves.draw(results, docs / f"averaging-{name}.png")
    about = results["machine"]
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    seeds = len(results["seeds"])
    setting = textwrap.fill(
        f"{experiment['train_images']} training images, {experiment['test_images']} test images; "
        f"one budget is {experiment['epochs']} epochs in batches of {experiment['batch_size']}; "
        f"rate {experiment['rate']}, constant rate of SWA {experiment['swa_rate']}, cycles from "
        f"{experiment['cycle_high']} to {experiment['cycle_low']}, momentum "
        f"{experiment['momentum']}, weight decay {experiment['weight_decay']}; EMA of every update "
        f"with decay {experiment['ema_decay']}; snapshots from {experiment['swa']['start']} on, "
        f"every {experiment['swa']['every']}. The schedules are the paper's, on these budgets.",
        width=100,
    )
    made = textwrap.fill(
        f"Written by `{results['command']}`. {seeds} seeds: of the initial weights, the order of "
        f"the images and what is done to them, the same in every framework. {about['cpu']}, "
        f"{about['cores']} cores, Python {about['python']}; {versions}.",
        width=100,
    )
    comparable = SMALL if experiment["network"] in NETWORKS else FULL
    tables = "\n\n".join(scores(results, framework) for framework in results["frameworks"])
    page = f"""\
# Does averaging help? {experiment["dataset"]}, {experiment["network"]}

{made}

{setting}

## Scores

Mean and standard deviation over the seeds.

{tables}

## Differences, paired by seed

Mean, 95 % confidence interval (Student's t) and the p value of the exact sign-flip test, which
cannot be less than {2 / 2 ** min(seeds, 16):.3g} with {seeds} seeds. Bold: the interval does not
cover 0. None is corrected for the number of comparisons.

{differences(results, "accuracy")}

{differences(results, "nll")}

{differences(results, "ece")}

## The frameworks agree?

By negative log-likelihood:

{agreement(results)}

![Test error of the running weights and of the averages](averaging-{name}.png)

## Beside the paper

{PAPER}
{comparable}
"""
    (docs / f"averaging-{name}.md").write_text(page, encoding="utf-8")
    return page
