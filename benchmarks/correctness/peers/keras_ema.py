"""Keras: an optimizer with ``use_ema``, and the callback ``SwapEMAWeights``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from correctness.cells import NotApplicableError
from correctness.keras_training import Follow, KerasPeer, Weights
from correctness.peer import Tree
from correctness.rules import DECAY, EMA_FROM_FIRST
from correctness.scripts import Intent


class EMAPeer(KerasPeer):
    """It has no schedule: every update is a snapshot, whatever is wanted."""

    def make(self, intent: Intent | None) -> tuple[Any, list[Any]]:
        if intent is not None:
            raise NotApplicableError("no schedule: averages every update")
        optimizer = Follow(use_ema=True, ema_momentum=DECAY)
        return optimizer, [keras.callbacks.SwapEMAWeights()]

    def average(self, model: Any, layer: Weights, callbacks: Sequence[Any]) -> tuple[Tree, str]:
        kept = self.kept(model)
        found = {
            name: np.array(keras.ops.convert_to_numpy(variable), np.float64)
            for name, variable in zip(("kernel", "bias"), kept, strict=False)
        }
        return found, keras.backend.standardize_dtype(kept[0].dtype)

    def kept(self, model: Any) -> list[Any]:
        return [v for v in model.optimizer.variables if "average" in v.path]

    def backup(self, folder: str, callbacks: Sequence[Any]) -> Any:
        return keras.callbacks.BackupAndRestore(folder)


PEERS = [EMAPeer("Keras use_ema", EMA_FROM_FIRST)]
