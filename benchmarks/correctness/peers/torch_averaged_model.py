"""``torch.optim.swa_utils``: AveragedModel, and the loop with SWALR that its documentation has."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

from correctness.peer import SteppedPeer
from correctness.rules import DECAY, EMA_FROM_FIRST, UNIFORM
from correctness.scripts import Intent, Script
from correctness.torch_training import SecondModelTraining


class AveragedModelTraining(SecondModelTraining):
    """A call of ``update_parameters`` after each step, or the documented loop if there is a start.

    That loop counts epochs from 0 and averages where ``i > swa_start``; an update is an epoch here.
    It has no distance between snapshots.
    """

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        **keywords: Any,
    ) -> None:
        self.keywords = keywords
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        self.averager = AveragedModel(self.model, **self.keywords)
        if self.intent is not None:
            self.scheduler = SWALR(self.optimizer, swa_lr=0.05)

    def after_step(self, update: int) -> None:
        i = update - 1
        if self.intent is None:
            self.averager.update_parameters(self.trained)
        elif i > self.intent.start:
            self.averager.update_parameters(self.trained)
            self.scheduler.step()

    def averaged_module(self) -> Module:
        return self.averager.module

    def recompute(self, module: Module, inputs: list[Tensor]) -> str:
        if self.keywords.get("use_buffers"):
            return ""  # documented as the other way: statistics are averaged, not recomputed
        update_bn(inputs, self.averager)
        return "update_bn"


SWA_MULTI = {"multi_avg_fn": get_swa_multi_avg_fn()}
EMA_MULTI = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}
PEERS = [
    SteppedPeer("AveragedModel", UNIFORM, AveragedModelTraining),
    SteppedPeer(
        "AveragedModel, swa_multi_avg_fn", UNIFORM, AveragedModelTraining, keywords=SWA_MULTI
    ),
    SteppedPeer(
        "AveragedModel, ema_multi_avg_fn", EMA_FROM_FIRST, AveragedModelTraining, keywords=EMA_MULTI
    ),
    SteppedPeer(
        "AveragedModel, use_buffers=True",
        UNIFORM,
        AveragedModelTraining,
        keywords={"use_buffers": True},
    ),
]
