"""All trainings of a sweep, each computed once, and what they gave as arrays."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from experiments.cache import Cache
from experiments.sweep_plan import Plan
from experiments.sweep_training import Split, rounds, run, steps_per_epoch

PARTS = ("held_out", "test")
METRICS = ("nll", "accuracy")
# Part of every key: a change of what a run computes makes it another number.
REVISION = 1


def key(plan: Plan, dataset: str, rate: str, seed: int) -> str:
    """The name of one training in the cache: a hash of all that it depends on."""
    return Cache.key(
        {
            "sweep": REVISION,
            "dataset": dataset,
            "training": asdict(plan.training),
            "cells": [list(cell) for cell in plan.cells()],
            "rate": plan.rates[rate],
            "seed": seed,
            "torch": torch.__version__,
        }
    )


def collect(
    plan: Plan, dataset: str, data: Split, seeds: list[int], cache: Cache
) -> list[dict[str, Any]]:
    """Every training of every rate and seed, from the cache where it lies there.

    One seed after another: of an interrupted sweep, fewer seeds are a whole result.
    """
    wanted = [(rate, seed) for seed in seeds for rate in plan.rates]
    runs = []
    each = rounds(plan, data)
    with tqdm(total=len(wanted) * each, desc=dataset, unit="part") as bar:
        for rate, seed in wanted:
            name = key(plan, dataset, rate, seed)
            found = cache.load(name)
            if found is None:
                found = run(plan, data, rate, seed, bar.update)
                cache.store(name, found)
            else:
                bar.update(each)
            runs.append({"rate": rate, "seed": seed, **found})
    return runs


def joined(plan: Plan, data: Split, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs as one table: what a report is made of, and what is stored.

    Returns:
      ``n_averaged`` and ``last_snapshot`` [updates] by cell; ``last`` and ``last + update_bn``: by
      rate, part and metric a list [seeds]; ``averages``: likewise [seeds][cells].
    """
    by_rate = {rate: [run for run in runs if run["rate"] == rate] for rate in plan.rates}

    def table(of: Any) -> dict[str, Any]:
        return {
            rate: {
                part: {metric: [of(run, part, metric) for run in runs] for metric in METRICS}
                for part in PARTS
            }
            for rate, runs in by_rate.items()
        }

    steps = steps_per_epoch(data, plan.training)
    return {
        "images": {part: len(getattr(data, part)[1]) for part in ("train", *PARTS)},
        "steps_per_epoch": steps,
        "n_averaged": [cell["n_averaged"] for cell in runs[0]["cells"]],
        "last_snapshot": [plan.snapshots(cell, steps)[-1] for cell in plan.cells()],
        "last": table(lambda run, part, metric: _short(run["last"][part][metric])),
        "last + update_bn": table(
            lambda run, part, metric: _short(run["last + update_bn"][part][metric])
        ),
        "averages": table(
            lambda run, part, metric: [_short(cell[part][metric]) for cell in run["cells"]]
        ),
    }


def _short(value: float) -> float:
    return round(value, 6)
