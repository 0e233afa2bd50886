"""``torchcontrib.optim.SWA``, the wrapper by the paper's authors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torchcontrib.optim
from torch import Tensor
from torch.nn import Module

from correctness.peer import SteppedPeer, in_and_out
from correctness.rules import UNIFORM
from correctness.torch_training import Follow, TorchTraining


class TorchcontribTraining(TorchTraining):
    """Automatic mode if there is a start, else ``update_swa`` after each step."""

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Any:
        if self.intent is None:
            return torchcontrib.optim.SWA(Follow(parameters))
        return torchcontrib.optim.SWA(
            Follow(parameters), swa_start=self.intent.start, swa_freq=self.intent.every, swa_lr=0.05
        )

    def after_step(self, update: int) -> None:
        if self.intent is None:
            self.optimizer.update_swa()

    def averages(self) -> list[Tensor]:
        parameters = [self.model.kernel, self.model.bias]
        if "swa_buffer" not in self.optimizer.state[parameters[0]]:
            with self.evaluated():  # which leaves them as they are, with a warning
                return [parameter.clone() for parameter in parameters]
        return [self.optimizer.state[parameter]["swa_buffer"] for parameter in parameters]

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        return in_and_out(self.optimizer.swap_swa_sgd, self.optimizer.swap_swa_sgd)

    def recompute(self, module: Module, inputs: list[Tensor]) -> str:
        self.optimizer.bn_update(inputs, module)
        return "bn_update"

    def state(self) -> dict[str, Any]:
        return {}  # the optimizer's state holds the average

    def shares_memory(self) -> bool:
        if "swa_buffer" not in self.optimizer.state[self.model.kernel]:
            return False  # nothing is made yet
        return super().shares_memory()


PEERS = [SteppedPeer("torchcontrib SWA", UNIFORM, TorchcontribTraining)]
