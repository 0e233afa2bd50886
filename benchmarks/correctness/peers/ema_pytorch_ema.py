"""``ema_pytorch.EMA``: as it comes, and as the simple average that its documentation names."""

from __future__ import annotations

import copy
from typing import Any

from ema_pytorch import EMA
from torch.nn import Module

from correctness.peer import SteppedPeer
from correctness.rules import DECAY, EMA_POWER, UNIFORM
from correctness.scripts import Intent, Script
from correctness.torch_training import SecondModelTraining


class EMATraining(SecondModelTraining):
    """``update`` after each step.

    Args:
      wide: whether it is handed a float32 model for the average, with ``coerce_dtype``.
      keywords: of ``EMA``.
    """

    def __init__(
        self,
        script: Script,
        intent: Intent | None = None,
        *,
        compiled: bool = False,
        wide: bool = False,
        **keywords: Any,
    ) -> None:
        self.keywords, self.wide = keywords, wide
        super().__init__(script, intent, compiled=compiled)

    def make_averager(self) -> None:
        intent = self.intent or Intent(0, 1)
        options = dict(self.keywords)
        if self.wide:
            options["ema_model"] = copy.deepcopy(self.model).float()
            options["coerce_dtype"] = True
        self.averager = EMA(
            self.trained,
            beta=DECAY,
            update_after_step=intent.start,
            update_every=intent.every,
            **options,
        )

    def after_step(self, update: int) -> None:
        self.averager.update()

    def averaged_module(self) -> Module:
        return self.averager.ema_model


PEERS = [
    SteppedPeer("ema-pytorch", EMA_POWER, EMATraining),
    SteppedPeer("ema-pytorch, power=1", UNIFORM, EMATraining, keywords={"power": 1.0}),
    SteppedPeer("ema-pytorch, float32 ema_model", EMA_POWER, EMATraining, keywords={"wide": True}),
]
