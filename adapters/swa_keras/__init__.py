"""Weight averaging for Keras 3, on the tensorflow, jax and torch backends."""

from swa_keras.batch_norm import update_bn
from swa_keras.callback import SWA
from swa_keras.optimizer import SWAOptimizer
from swa_keras.plots import loss_line, loss_plane, loss_rays
from swa_keras.schedule import SWASchedule

__all__ = [
    "SWA",
    "SWAOptimizer",
    "SWASchedule",
    "loss_line",
    "loss_plane",
    "loss_rays",
    "update_bn",
]
