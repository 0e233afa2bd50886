"""Growth in Keras, on the backend of this process: ours, the fastest other way, the loop in C."""

from __future__ import annotations

from collections.abc import Mapping

import ceiling
import keras
from growth import Beside
from keras_contenders import CEILING, CONTENDERS, LOOP, NAIVE, uniform
from keras_sets import MovingWeights, Weighted

PACKAGES = ("keras", keras.backend.backend(), "numpy")
NAMES = (CEILING, 'swa_keras, nonfinite="keep"', 'swa_keras, nonfinite="skip"', LOOP, NAIVE)
# Of the weights: themselves, an average for each, C's own weights, the list of get_weights.
COPIES = 1 + len(NAMES) + 2


def beside(count: int, n_weights: int) -> Beside:
    """So many variables of so many weights in all."""
    model = Weighted([(n_weights // count,)] * count, "float32")
    weights = MovingWeights(model)
    absent = {} if (why := ceiling.missing()) is None else {CEILING: why}
    running = {
        who.name: who.build(model)
        for who in CONTENDERS
        if who.name in NAMES and who.name not in absent
    }

    def errors() -> Mapping[str, float]:
        return {
            name: weights.error(each.averages(), uniform)
            for name, each in running.items()
            if name != CEILING  # whose weights do not move
        }

    updates = {name: each.update for name, each in running.items()}
    return Beside(updates, weights.move, errors, absent)
