"""Weight averaging (SWA, EMA) for JAX: a gradient transformation for the end of an optax chain."""

from swa_optax.accumulating import accumulate, init
from swa_optax.batch_norm import update_bn
from swa_optax.files import load_average, save_average
from swa_optax.learning_rate import swa_lr
from swa_optax.plots import loss_line, loss_plane, loss_rays
from swa_optax.reading import averaged_params, finalize, n_averaged, n_skipped
from swa_optax.saving import state_from_dict, state_to_dict
from swa_optax.transform import swa
from swa_optax.wrapping import wrap

__all__ = [
    "accumulate",
    "averaged_params",
    "finalize",
    "init",
    "load_average",
    "loss_line",
    "loss_plane",
    "loss_rays",
    "n_averaged",
    "n_skipped",
    "save_average",
    "state_from_dict",
    "state_to_dict",
    "swa",
    "swa_lr",
    "update_bn",
    "wrap",
]
