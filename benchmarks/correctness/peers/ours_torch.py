"""``swa_torch.SWA``, an optimizer around the one of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module

from correctness.peer import SteppedPeer
from correctness.rules import UNIFORM
from correctness.torch_training import Follow, TorchTraining
from swa_torch import SWA, update_bn


class SWATraining(TorchTraining):
    """The loop without a change, and ``averaged()`` around evaluations."""

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Any:
        start, every = (self.intent.start, self.intent.every) if self.intent else (1, 1)
        return SWA(Follow(parameters), {"start": f"{start}step", "every": f"{every}step"})

    def averages(self) -> list[Tensor]:
        return self.optimizer.averaged_parameters

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        return self.optimizer.averaged(self.model)

    @contextlib.contextmanager
    def model_to_evaluate(self) -> Iterator[Module]:
        with self.optimizer.averaged(self.model):
            yield self.model

    def recompute(self, module: Module, inputs: list[Tensor]) -> str:
        update_bn(module, inputs)
        return "update_bn"

    def state(self) -> dict[str, Any]:
        return {}  # the optimizer's state holds the average


PEERS = [SteppedPeer("swa_torch SWA", UNIFORM, SWATraining)]
