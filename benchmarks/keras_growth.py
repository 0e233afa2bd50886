"""Growth in Keras, on the backend of this process: ours, the fastest other way, the loop in C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ceiling
import keras
from growth import Beside
from keras_contenders import CEILING, CONTENDERS, LOOP, NAIVE, uniform
from keras_sets import MovingWeights, Weighted

PACKAGES = ("keras", keras.backend.backend(), "numpy")
OURS = 'swa_keras, nonfinite="skip"'
# Of the weights, measured; see ``growth.affordable``.
COPIES = {
    "": 2.6,
    OURS: 1,
    'swa_keras, nonfinite="keep"': 1,
    CEILING: 2,
    LOOP: 1,
    NAIVE: 2,
}


def beside(count: int, n_weights: int, names: Sequence[str]) -> Beside:
    """So many variables of so many weights in all, averaged by these."""
    model = Weighted([(n_weights // count,)] * count, "float32")
    weights = MovingWeights(model)
    absent = {} if (why := ceiling.missing()) is None else {CEILING: why}
    running = {
        who.name: who.build(model)
        for who in CONTENDERS
        if who.name in names and who.name not in absent
    }

    def errors() -> Mapping[str, float]:
        return {
            name: weights.error(each.averages(), uniform)
            for name, each in running.items()
            if name != CEILING  # whose weights do not move
        }

    updates = {name: each.update for name, each in running.items()}
    return Beside(updates, weights.move, errors, absent)
