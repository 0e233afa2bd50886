"""``swa_keras.SWA``, a callback of ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from correctness.keras_training import Follow, KerasPeer, Weights, host
from correctness.peer import Tree
from correctness.rules import UNIFORM
from correctness.scripts import Intent
from swa_keras import SWA, update_bn


class SWAPeer(KerasPeer):
    """Validates on the average, and ends on it."""

    def make(self, intent: Intent | None) -> tuple[Any, list[Any]]:
        start, every = (intent.start, intent.every) if intent else (1, 1)
        config = {"start": f"{start}step", "every": f"{every}step"}
        return Follow(), [SWA(config, validate="average")]

    def average(self, model: Any, layer: Weights, callbacks: Sequence[Any]) -> tuple[Tree, str]:
        (swa,) = [callback for callback in callbacks if isinstance(callback, SWA)]
        if not swa.n_averaged:
            return host(layer), "none yet"  # fit ends on the weights, with a warning
        kept = swa.averaged_weights
        found = {
            name: np.array(value, np.float64)
            for name, value in zip(("kernel", "bias"), kept, strict=False)
        }
        return found, str(np.asarray(kept[0]).dtype)

    def backup(self, folder: str, callbacks: Sequence[Any]) -> Any:
        (swa,) = callbacks
        return swa.backup(folder)

    def recompute(self, model: Any, inputs: list[Any]) -> str:
        update_bn(model, inputs, verbose=0)
        return "update_bn"


PEERS = [SWAPeer("swa_keras SWA", UNIFORM)]
