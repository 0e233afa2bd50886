"""``torch_ema.ExponentialMovingAverage``: as it comes, and moved to float32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch_ema import ExponentialMovingAverage

from correctness.cells import NotApplicableError
from correctness.peer import SteppedPeer
from correctness.rules import DECAY, EMA_WARMED_UP
from correctness.scripts import Intent, Script
from correctness.torch_training import TorchTraining


class TorchEMATraining(TorchTraining):
    """``update`` after each step, and ``average_parameters()`` around evaluations."""

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        wide: bool = False,
    ) -> None:
        self.wide = wide
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        if self.intent is not None:
            raise NotApplicableError("no schedule: the loop counts")
        self.averager = ExponentialMovingAverage(self.trained.parameters(), DECAY)
        if self.wide:
            self.averager.to(dtype=torch.float32)

    def after_step(self, update: int) -> None:
        self.averager.update()

    def averages(self) -> list[Tensor]:
        return self.averager.shadow_params

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        return self.averager.average_parameters()

    def state(self) -> dict[str, Any]:
        return {"averager": self.averager.state_dict()}


PEERS = [
    SteppedPeer("torch-ema", EMA_WARMED_UP, TorchEMATraining),
    SteppedPeer("torch-ema, to(float32)", EMA_WARMED_UP, TorchEMATraining, keywords={"wide": True}),
]
