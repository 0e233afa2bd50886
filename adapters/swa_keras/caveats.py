"""What an average is not for a model, said once, at the start of its training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from swa_core import SWAWarning
from swa_keras import batch_norm
from swa_keras.model_state import lora_layers


class Caveats:
    """Warns at the start of a training of what the user would notice at its end, or never.

    Args:
      recomputes: whether there is data to recompute batch-norm statistics on.
      uses_average: whether the training itself computes with the average.
    """

    def __init__(self, *, recomputes: bool, uses_average: bool) -> None:
        self._recomputes = recomputes
        self._uses_average = uses_average
        self._said: set[Callable[..., Any]] = set()

    def say(self, model: Any) -> None:
        """Says of this model what was not said before.

        Raises:
          BatchNormError: there is data for batch-norm statistics, and a layer whose statistics
            cannot be recomputed.
        """
        if self._recomputes and model.built:
            batch_norm.check(model)
        for caveat in (self._batch_norm, batch_norm.of_lookalikes, _lora):
            if caveat not in self._said and (what := caveat(model)):
                self._said.add(caveat)
                warnings.warn(f"SWA: {what}", SWAWarning, stacklevel=4)

    def _batch_norm(self, model: Any) -> str | None:
        if self._recomputes or not self._uses_average or not batch_norm.has_batch_norm(model):
            return None
        return (
            "the model has batch norm, whose running statistics do not fit the averaged weights. "
            "Pass SWA(..., bn_data=training_data), or call swa_keras.update_bn(model, "
            "training_data) after the training."
        )


def _lora(model: Any) -> str | None:
    layers = lora_layers(model)
    if not layers:
        return None
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return (
        f"layer '{layers[0].path}'{more} trains LoRA factors, which are averaged one by one: the "
        "product of the averages is not the average of the products (near it for snapshots that "
        "are near each other). For the average of the kernels train the kernels themselves."
    )
