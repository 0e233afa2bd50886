"""What Keras' own averaging gets wrong when it swaps: predict, exceptions, rounding, infinities.

The numbers are those of the defects on the facts page: 2, 4 and 5.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, dense, everything, fit, same, weights

from swa_keras import SWA

EVERY_STEP = {"start": "1step", "every": "1step"}


@pytest.mark.parametrize("finalize", [True, False])
def test_predict_and_evaluate_after_training_see_what_was_chosen(finalize):
    """Defect 2: a callback given to predict leaves its weights in the model."""
    plain, model, swa = dense(), dense(), SWA(EVERY_STEP, finalize=finalize)
    fit(plain)
    fit(model, swa)
    wanted = swa.averaged_weights if finalize else weights(plain)
    for _ in range(2):
        model.predict(X, verbose=0, callbacks=[swa])
        same(weights(model), wanted)
        model.evaluate(X, Y, verbose=0, callbacks=[swa])
        same(weights(model), wanted)
    predicted = model.predict(X, verbose=0, callbacks=[swa])
    with swa.averaged():
        averaged = model.predict(X, verbose=0, callbacks=[swa])
    np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)
    assert np.array_equal(averaged, predicted) == finalize


class Explode(keras.callbacks.Callback):
    """Raises in some hook, in the second epoch."""

    def __init__(self, hook, error):
        super().__init__()
        self.epoch = -1

        def explode(*arguments, **keywords):
            if self.epoch == 1:
                raise error

        if hook == "on_epoch_begin":
            error_at_second = explode

            def explode(epoch, logs=None):
                self.epoch = epoch
                error_at_second()

        setattr(self, hook, explode)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


@pytest.mark.parametrize(
    ("validate", "error"), [("both", RuntimeError("boom")), ("average", KeyboardInterrupt())]
)
@pytest.mark.parametrize(
    "hook",
    [
        "on_test_begin",
        "on_test_batch_begin",
        "on_test_batch_end",
        "on_test_end",
        "on_epoch_end",
        "on_train_batch_end",
    ],
)
def test_whatever_is_raised_the_training_weights_are_in_the_model(hook, validate, error):
    """Defect 4: an exception in validation leaves the averaged weights in the model."""
    model, swa, after = dense(), SWA(EVERY_STEP, validate=validate), []

    class Last(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            after.append(weights(self.model))

    with pytest.raises(type(error)):
        fit(model, Last(), swa, Explode(hook, error), validation_data=(X, Y))
    same(weights(model), after[-1])
    with swa.averaged():  # nothing is left swapped in
        same(weights(model), swa.averaged_weights)
    same(weights(model), after[-1])


@pytest.mark.parametrize("validate", ["both", "average"])
def test_a_swap_is_exact_to_the_last_bit(validate):
    """Defect 5: swapping by adding and subtracting rounds."""
    plain, model = dense(), dense()
    for one in (plain, model):
        # Beside such weights the average loses digits, and what is computed of both loses all.
        for variable in one.layers[1].trainable_variables:
            variable.assign(np.full(variable.shape, 3e7, "float32"))
    fit(plain, epochs=3, validation_data=(X, Y))
    swa = SWA(EVERY_STEP, validate=validate, finalize=False)
    fit(model, swa, epochs=3, validation_data=(X, Y))
    same(everything(model), everything(plain))
    before, average = everything(model), swa.averaged_weights
    for _ in range(5):
        with swa.averaged():
            same(weights(model), average)
        same(everything(model), before)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_where_it_is(value):
    """Defect 5: an infinity goes from the weights to the average, and back as NaN."""
    model, swa = dense(), SWA(EVERY_STEP, finalize=False)
    fit(model, swa, epochs=1)
    average = swa.averaged_weights
    variable = model.trainable_variables[0]
    variable.assign(np.full(variable.shape, value, "float32"))
    before = everything(model)
    for _ in range(2):
        with swa.averaged():
            same(weights(model), average)
        same(everything(model), before)
    same(swa.averaged_weights, average)
    # And the other way round.
    model, swa = dense(), SWA({**EVERY_STEP, "nonfinite": "keep"}, finalize=False)
    first = model.trainable_variables[0]
    live = weights(model)
    first.assign(np.full(first.shape, value, "float32"))
    swa.update(model)
    first.assign(live[0])
    with swa.averaged(model):
        assert not np.isfinite(weights(model)[0]).any()
    same(weights(model), live)
