"""timm: ``ModelEmaV2``, and ``ModelEmaV3`` with the options it has against its own traps."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from torch_peers import import_timm

from correctness.cells import NotApplicableError
from correctness.peer import SteppedPeer
from correctness.rules import DECAY, EMA_FROM_INITIAL, UNIFORM
from correctness.scripts import Intent, Script
from correctness.torch_training import SecondModelTraining


class V2Training(SecondModelTraining):
    """``update`` after each step."""

    def make_averager(self) -> None:
        if self.intent is not None:
            raise NotApplicableError("no schedule: the loop counts")
        self.averager = import_timm().ModelEmaV2(self.model, decay=DECAY)

    def after_step(self, update: int) -> None:
        self.averager.update(self.trained)

    def averaged_module(self) -> Module:
        return self.averager.module


class V3Training(SecondModelTraining):
    """``update`` after each step, as timm's training script calls it, with the step's number.

    Args:
      counted: whether that number is passed on; start and warm-up need it.
      keywords: of ``ModelEmaV3``.
    """

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        counted: bool = False,
        **keywords: Any,
    ) -> None:
        self.keywords = keywords
        self.counted = counted or intent is not None
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        after = self.intent.start if self.intent else 0
        self.averager = import_timm().ModelEmaV3(
            self.model, decay=DECAY, update_after_step=after, **self.keywords
        )

    def after_step(self, update: int) -> None:
        self.averager.update(self.trained, step=update if self.counted else None)

    def averaged_module(self) -> Module:
        return self.averager.module


# By its documentation a simple average.
SIMPLE = {"counted": True, "use_warmup": True, "warmup_gamma": 1.0, "warmup_power": 1.0}
PEERS = [
    SteppedPeer("timm ModelEmaV2", EMA_FROM_INITIAL, V2Training),
    SteppedPeer("timm ModelEmaV3", EMA_FROM_INITIAL, V3Training),
    SteppedPeer(
        "timm ModelEmaV3, dtype=float32",
        EMA_FROM_INITIAL,
        V3Training,
        keywords={"dtype": torch.float32},
    ),
    SteppedPeer(
        "timm ModelEmaV3, exclude_buffers",
        EMA_FROM_INITIAL,
        V3Training,
        keywords={"exclude_buffers": True},
    ),
    SteppedPeer("timm ModelEmaV3, warmup_power=1", UNIFORM, V3Training, keywords=SIMPLE),
]
