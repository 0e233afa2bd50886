"""``schedulefree.SGDScheduleFree``, whose evaluation weights are the mean of a sequence it steps.

It averages instead of annealing and is no averager of another optimizer's weights; what can be
compared is how exactly it keeps that mean, and what surrounds it. Gradients are chosen so that its
``z`` goes where the script says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import schedulefree
from torch import Tensor
from torch.nn import Module

from correctness.cells import NotApplicableError
from correctness.peer import Outcome, SteppedPeer, Tree, in_and_out
from correctness.rules import UNIFORM
from correctness.torch_training import TorchTraining, host


class ScheduleFreeTraining(TorchTraining):
    """The documented loop: ``train()`` before the steps, ``eval()`` around evaluations."""

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Any:
        if self.intent is not None:
            raise NotApplicableError("no schedule: averages every update")
        optimizer = schedulefree.SGDScheduleFree(parameters, lr=1.0)
        optimizer.train()
        return optimizer

    def step(self, update: int) -> None:
        if self.script.counts is not None:
            self.model.count.fill_(self.script.counts[update])
        if self.inputs:
            self.model.train()
            self.model(self.inputs[update % len(self.inputs)])
        for name, target in self.targets[update].items():
            parameter = getattr(self.model, name)
            z = self.optimizer.state[parameter].get("z", parameter.detach())
            parameter.grad = z - target
        self.optimizer.step()

    def sequence(self) -> Tree:
        """``z``, which is averaged."""
        return {
            name: host(self.optimizer.state[getattr(self.model, name)].get("z", value))
            for name, value in (("kernel", self.model.kernel), ("bias", self.model.bias))
        }

    def averages(self) -> list[Tensor]:
        with self.evaluated():
            return [self.model.kernel.clone(), self.model.bias.clone()]

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        return in_and_out(self.optimizer.eval, self.optimizer.train)

    def recompute(self, module: Module, inputs: list[Tensor]) -> str:
        """As its documentation has it: forwards in training mode on the evaluation weights."""
        module.train()
        for x in inputs:
            module(x)
        return "forwards"

    def state(self) -> dict[str, Any]:
        return {}

    def save(self) -> bytes:
        self.optimizer.eval()  # the documentation: in eval mode when checkpoints are saved
        return super().save()

    def load(self, saved: bytes) -> None:
        super().load(saved)
        self.optimizer.train()

    def shares_memory(self) -> bool:
        raise NotApplicableError("the average is not kept, but computed")


class ScheduleFreePeer(SteppedPeer):
    """Whose trajectory is ``z``."""

    def train(self, script: Any, intent: Any = None) -> Outcome:
        if not np.isfinite(script.kernel).all():
            raise NotApplicableError("it is the optimizer: the training is NaN, too")
        training = self.build(script, intent=intent)
        trajectory = [training.sequence()]
        for update in range(1, script.updates + 1):
            training.step(update)
            trajectory.append(training.sequence())
        outcome = training.outcome()
        outcome.trajectory = {
            name: [weights[name] for weights in trajectory] for name in ("kernel", "bias")
        }
        return outcome


PEERS = [ScheduleFreePeer("schedulefree SGD", UNIFORM, ScheduleFreeTraining)]
