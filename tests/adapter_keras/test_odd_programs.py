"""Programs that nobody should write and somebody will: all is given back, and nothing stays."""

from __future__ import annotations

import keras
import pytest
from adapter_keras.small_models import dense, fit, same, weights

from swa_core import SwappedError
from swa_keras import SWA, SWAOptimizer

EVERY_STEP = {"start": "1step", "every": "1step"}


@pytest.mark.parametrize("second", ["averaged", "finalize", "averaged by the optimizer"])
def test_an_average_that_two_can_lend_is_lent_once(second):
    optimizer = SWAOptimizer(keras.optimizers.SGD(0.05), EVERY_STEP)
    model = dense(optimizer)
    one, two = SWA(finalize=False), SWA(finalize=False)
    fit(model, one, epochs=1)
    fit(model, two, epochs=1)
    before, average = weights(model), one.averaged_weights
    with one.averaged(), pytest.raises(SwappedError):
        if second == "averaged":
            two.averaged().__enter__()
        elif second == "finalize":
            two.finalize()
        else:
            optimizer.averaged(model).__enter__()
    same(weights(model), before)
    same(two.averaged_weights, average)
