"""Weight averaging for Keras 3: one callback on the tensorflow, jax and torch backends."""

from swa_keras.batch_norm import update_bn
from swa_keras.callback import SWA

__all__ = ["SWA", "update_bn"]
