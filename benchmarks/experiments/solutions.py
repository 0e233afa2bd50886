"""The weights that a seed's arms come to, in PyTorch: what the loss is looked at around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from experiments.arms import Arm, arms
from experiments.images import Images
from experiments.torch_training import Training

Weights = list[torch.Tensor]


def solutions(
    images: Images, seed: int, progress: Callable[[], object]
) -> tuple[Training, dict[str, Weights]]:
    """Trains a seed: SGD annealed, and SWA at the constant rate, one budget each.

    Returns:
      The training, whose model takes the weights; and by name, in the order of its parameters:
      "w_SGD"; "w1" and "w2", the first and the last snapshot; "w_SWA", the average of all.
    """
    every = {arm.name: arm for arm in arms(images.experiment)}
    constant = replace(every["constant"], end=images.experiment.epochs)
    training = Training(images, seed)
    found: dict[str, Weights] = {}
    ends: dict[str, dict[str, Any]] = {}
    for arm in (every["trunk"], every["annealed"], every["approach"], constant):
        if arm.after is not None:
            training.restore(ends[arm.after])
        training.begin(arm)
        _train(training, images, arm, seed, progress, found)
        ends[arm.name] = _copied(training.state(averages=False))
    found["w2"] = _weights(training)
    found["w_SWA"] = [w.clone() for w in training.averages["swa"].averaged_parameters]
    return training, found


def _train(
    training: Training,
    images: Images,
    arm: Arm,
    seed: int,
    progress: Callable[[], object],
    found: dict[str, Weights],
) -> None:
    for epoch in range(arm.begin, arm.end):
        training.epoch(images.epoch(seed, epoch), epoch)
        progress()
        if arm.name == "constant" and epoch + 1 == images.experiment.start:
            found["w1"] = _weights(training)
    if arm.name == "annealed":
        found["w_SGD"] = _weights(training)


def _weights(training: Training) -> Weights:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def _copied(state: Any) -> Any:
    """Training goes on in the tensors of a state: this one stays."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
