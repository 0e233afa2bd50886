"""Averages of checkpoints that are already on disk."""

from swa_core.checkpoints.averaging import Plan, average
from swa_core.checkpoints.opening import open_checkpoint
from swa_core.checkpoints.parts import EVERYTHING
from swa_core.checkpoints.selecting import best, expanded, weights_of, window_weights
from swa_core.checkpoints.tensors import Checkpoint, Spec

__all__ = [
    "EVERYTHING",
    "Checkpoint",
    "Plan",
    "Spec",
    "average",
    "best",
    "expanded",
    "open_checkpoint",
    "weights_of",
    "window_weights",
]
