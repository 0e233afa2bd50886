"""One training of the sweep in PyTorch, and the scores of all averages along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.scores import score
from experiments.sweep_averages import Averages
from experiments.sweep_plan import Plan, Training
from swa_torch import update_bn

AT_ONCE = 200  # images in a forward pass without gradients; more do not fit the cache of a core


@dataclass(frozen=True)
class Split:
    """Images [n, channels, height, width], float32, and labels [n].

    ``held_out`` is a part of the training set that no training sees.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(data: Any, training: Training) -> Split:
    """Divides a data set, the same way for every seed.

    The images kept for choosing are at most a quarter of the training set.

    Args:
      data: ``train_x``, ``train_y``, ``test_x``, ``test_y``, images channels last.
    """
    order = np.random.default_rng(0).permutation(len(data.train_y))
    held_out = min(training.held_out, len(order) // 4)
    train = min(training.train_images, len(order) - held_out)
    tested = np.random.default_rng(1).permutation(len(data.test_y))[: training.test_images]

    def tensors(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        # Channels stay last in memory: faster on a CPU.
        return torch.from_numpy(x[chosen]).permute(0, 3, 1, 2), torch.from_numpy(y[chosen]).long()

    return Split(
        tensors(data.train_x, data.train_y, order[:train]),
        tensors(data.train_x, data.train_y, order[train : train + held_out]),
        tensors(data.test_x, data.test_y, tested),
    )


def network(channels: int, classes: int = 10) -> nn.Module:
    """Three convolutions with batch norm, small enough for hundreds of trainings on one core."""
    widths = (channels, 16, 32, 64)
    layers: list[nn.Module] = []
    for n_in, n_out, stride in zip(widths, widths[1:], (2, 2, 1), strict=False):
        layers += [
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def run(
    plan: Plan, data: Split, rate: str, seed: int, progress: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Trains once and scores every cell.

    Seeds fix initialisation and batches, whatever the rate: two rates are comparable seed by seed.

    Args:
      rate: the name of one of the plan's rates.
      progress: called after every epoch, and after every scored average.

    Returns:
      ``last``: the scores of the last weights, with the statistics of batch norm that training
      left, and ``last + update_bn``: with recomputed ones; ``cells``: those of each average with
      recomputed ones, in the order of ``plan.cells()``, with their ``n_averaged``. Scores are by
      "held_out" and "test".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data.train[0].shape[1])
    averages = _trained(model, plan, data, rate, seed, progress)
    last = _scores(model, data)
    for_bn = data.train[0][: plan.training.bn_images].split(AT_ONCE)
    update_bn(model, for_bn)
    last_bn = _scores(model, data)
    steps = steps_per_epoch(data, plan.training)
    by_snapshots = {}
    for taken, state in averages.states.items():
        average = torch.from_numpy(state.average["weights"])
        vector_to_parameters(average, model.parameters())
        update_bn(model, for_bn)
        by_snapshots[taken] = {"n_averaged": state.n_averaged, **_scores(model, data)}
        progress()
    cells = [by_snapshots[plan.snapshots(cell, steps)] for cell in plan.cells()]
    return {"last": last, "last + update_bn": last_bn, "cells": cells}


def steps_per_epoch(data: Split, training: Training) -> int:
    """Updates of one epoch; the last batch may be smaller."""
    return -(-len(data.train[1]) // training.batch_size)


def rounds(plan: Plan, data: Split) -> int:
    """How often one ``run`` calls ``progress``."""
    steps = steps_per_epoch(data, plan.training)
    averages = {plan.snapshots(cell, steps) for cell in plan.cells()}
    return plan.training.epochs + len(averages)


def _trained(
    model: nn.Module,
    plan: Plan,
    data: Split,
    rate: str,
    seed: int,
    progress: Callable[[], object],
) -> Averages:
    training = plan.training
    steps = steps_per_epoch(data, training)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=training.rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    schedules = [plan.schedule(cell, steps) for cell in plan.cells()]
    averages = Averages(schedules, _vector(model), training.epochs * steps)
    rates = plan.learning_rates(rate, steps)
    rng = np.random.default_rng(seed)
    for _ in range(training.epochs):
        model.train()
        for x, y in _batches(data.train, training.batch_size, rng):
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            averages.update(_vector(model))
        progress()
    return averages


def _vector(model: nn.Module) -> np.ndarray:
    return parameters_to_vector(model.parameters()).detach().numpy()


def _batches(
    data: tuple[Tensor, Tensor], size: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data
    for chosen in torch.from_numpy(rng.permutation(len(y))).split(size):
        yield x[chosen], y[chosen]


def _scores(model: nn.Module, data: Split) -> dict[str, dict[str, float]]:
    model.eval()
    scores = {}
    for part in ("held_out", "test"):
        x, y = getattr(data, part)
        with torch.inference_mode():
            logits = torch.cat([model(images) for images in x.split(AT_ONCE)])
        found = score(logits.numpy(), y.numpy())
        scores[part] = {"accuracy": found.accuracy, "nll": found.nll}
    return scores
