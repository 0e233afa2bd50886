"""Validation in ``fit`` on the averaged weights, and what other callbacks see of it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    X,
    Y,
    dense,
    everything,
    fit,
    same,
    weights,
    with_batch_norm,
)

from swa_core import SWAWarning
from swa_keras import SWA

HALF = {"start": "50%", "every": "1ep"}


class Kept(keras.callbacks.Callback):
    """At each epoch's end: the weights of the model, of the average, and the logs."""

    def __init__(self, swa):
        super().__init__()
        self.swa, self.live, self.average, self.logs = swa, [], [], []

    def on_epoch_end(self, epoch, logs=None):
        self.live.append(weights(self.model))
        self.average.append(self.swa.averaged_weights if self.swa.n_averaged else None)
        self.logs.append(dict(logs))


def loss_of(values, make=dense):
    model = make()
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)
    return model.evaluate(X, Y, verbose=0)[0]


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_both_logs_the_running_and_the_averaged_weights(first):
    swa = SWA(HALF)
    kept = Kept(swa)
    fit(dense(), *([swa, kept] if first else [kept, swa]), validation_data=(X, Y))
    for logs, live, average in zip(kept.logs, kept.live, kept.average, strict=True):
        assert logs["val_loss"] == pytest.approx(loss_of(live), rel=1e-5)
        expected = loss_of(live if average is None else average)
        assert logs["val_swa_loss"] == pytest.approx(expected, rel=1e-5)
        assert "val_swa_mae" in logs
    # Columns are there from the first epoch on, and equal to the others until there is an average.
    assert kept.logs[0]["val_swa_loss"] == kept.logs[0]["val_loss"]


def test_average_logs_the_average_as_val():
    swa = SWA(HALF, validate="average")
    kept = Kept(swa)
    fit(dense(), swa, kept, validation_data=(X, Y))
    assert not any(key.startswith("val_swa") for key in kept.logs[-1])
    assert kept.logs[0]["val_loss"] == pytest.approx(loss_of(kept.live[0]), rel=1e-5)
    assert kept.logs[-1]["val_loss"] == pytest.approx(loss_of(kept.average[-1]), rel=1e-5)


def test_raw_leaves_validation_alone():
    swa = SWA(HALF, validate="raw")
    history = fit(dense(), swa, validation_data=(X, Y))
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae"}


class Bomb(keras.layers.Layer):
    """Raises in validation when told to, at tracing or in the step itself."""

    armed = False

    def call(self, x, training=None):
        if Bomb.armed and not training:
            raise RuntimeError("bomb")
        return x


def explosive():
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, trainable=False),
            keras.layers.Dense(5, "tanh"),
            keras.layers.BatchNormalization(),
            Bomb(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("validate", ["both", "average"])
def test_the_training_weights_are_back_after_a_raise_in_validation(validate):
    plain, model = explosive(), explosive()
    fit(plain, epochs=2, validation_data=(X, Y))
    swa = SWA({"start": "1ep", "every": "1ep"}, validate=validate, bn_data=X)
    # Armed once the average is in the model: the second pass, or the only one.
    arm = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(Bomb, "armed", epoch == 1)
    )
    try:
        with pytest.raises(RuntimeError, match="bomb"):
            fit(model, swa, arm, validation_data=(X, Y))
    finally:
        Bomb.armed = False
    same(weights(model), weights(plain))
    same(model.get_weights(), plain.get_weights())
    assert np.isfinite(model.predict(X, verbose=0)).all()
    # The next training without the callback is as if it had never been there.
    assert set(fit(model, epochs=1, validation_data=(X, Y)).history) == {"loss", "val_loss"}
    fit(plain, epochs=1, validation_data=(X, Y))
    same(everything(model), everything(plain))


class Late(keras.callbacks.Callback):
    """Raises at the second batch of the second validation."""

    def __init__(self):
        super().__init__()
        self.validations = 0

    def on_test_begin(self, logs=None):
        self.validations += 1

    def on_test_batch_end(self, batch, logs=None):
        if self.validations == 2 and batch == 1:
            raise KeyboardInterrupt


def test_the_training_weights_are_back_after_an_interrupt_in_the_middle_of_validation():
    plain, model = with_batch_norm(), with_batch_norm()
    fit(plain, epochs=2, validation_data=(X, Y))
    swa = SWA({"start": "1ep", "every": "1ep"}, validate="average", bn_data=(X, Y))
    with pytest.raises(KeyboardInterrupt):
        fit(model, Late(), swa, validation_data=(X, Y))
    assert swa.n_averaged == 2
    same(model.get_weights(), plain.get_weights())


def test_evaluate_is_the_models_own_again_after_fit_and_untouched_outside_of_it():
    model, seen = dense(), []
    swa = SWA(HALF, finalize=False)
    own = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            (swa.model.evaluate(X, Y, verbose=0, return_dict=True), logs)
        )
    )
    fit(model, swa, own, validation_data=(X, Y))
    for mine, logs in seen:
        assert set(mine) == {"loss", "mae"}
        assert mine["loss"] == pytest.approx(logs["val_loss"], rel=1e-5)
    assert "evaluate" not in vars(model)


def test_callbacks_see_one_validation_for_each_epoch():
    late = Late()
    fit(dense(), SWA(HALF), keras.callbacks.LambdaCallback(), validation_data=(X, Y))
    late.on_test_batch_end = lambda batch, logs=None: None
    fit(dense(), late, SWA(HALF), validation_data=(X, Y))
    assert late.validations == 4


def test_early_stopping_can_monitor_the_average_and_fit_still_ends_on_it():
    class Worse(keras.callbacks.EarlyStopping):
        def get_monitor_value(self, logs):
            assert "val_swa_loss" in logs
            return float(self.stopped_epoch + len(self.model.history.epoch))

    swa = SWA({"start": "1ep", "every": "1ep"})
    model = dense()
    history = fit(
        model, Worse("val_swa_loss", mode="min", patience=1), swa, validation_data=(X, Y), epochs=10
    )
    assert len(history.epoch) == 2
    assert swa.n_averaged == 2
    same(weights(model), swa.averaged_weights)


def test_early_stopping_that_restores_listed_before_loses_to_the_average():
    swa, model = SWA({"start": "1ep", "every": "1ep"}), dense()
    early = keras.callbacks.EarlyStopping("loss", patience=0, restore_best_weights=True)
    fit(model, early, swa, validation_data=(X, Y))
    same(weights(model), swa.averaged_weights)


def test_validation_with_bn_data_recomputes_batch_norm():
    swa = SWA(HALF, bn_data=(X, Y))
    model = with_batch_norm()
    history = fit(model, swa, validation_data=(X, Y))
    # The last validation saw what fit ends with.
    final = model.evaluate(X, Y, verbose=0)[0]
    assert history.history["val_swa_loss"][-1] == pytest.approx(final, rel=1e-5)


def test_without_bn_data_one_warning_at_the_start_tells_the_remedy():
    swa, model = SWA(HALF), with_batch_norm()
    with pytest.warns(SWAWarning, match="bn_data=training_data"):
        fit(model, swa, validation_data=(X, Y))
    fit(model, swa, validation_data=(X, Y))  # where a second warning would be an error


def test_two_callbacks_that_log_the_same_names_warn_once():
    model = dense()
    one, two = SWA({"start": "1ep", "every": "1ep"}), SWA(HALF)
    with pytest.warns(SWAWarning, match="both log val_swa"):
        history = fit(model, one, two, validation_data=(X, Y))
    assert history.history["val_swa_loss"][0] == history.history["val_loss"][0]  # those of two
    assert "evaluate" not in vars(model)


def test_two_callbacks_on_one_model_are_independent():
    model = dense()
    one = SWA({"start": "1ep", "every": "1ep"}, validate="raw", finalize=False)
    two = SWA(HALF)
    history = fit(model, one, two, validation_data=(X, Y))
    assert (one.n_averaged, two.n_averaged) == (4, 3)
    same(weights(model), two.averaged_weights)
    assert "val_swa_loss" in history.history
    three = SWA({"start": "1ep", "every": "1ep"}, validate="average", finalize=False)
    fit(model, three, two, validation_data=(X, Y))
    assert "evaluate" not in vars(model)
