"""Validation in ``fit`` on the averaged weights, and what other callbacks see of it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    STEPS,
    X,
    Y,
    array,
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
    # Armed once there is an average: it is in the model when the bomb goes off.
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
    one, two = SWA({"start": "1ep", "every": "1ep"}, finalize=False), SWA(HALF)
    with pytest.warns(SWAWarning, match=r"all log val_swa_\*"):
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


@pytest.mark.parametrize("validate", ["both", "average"])
@pytest.mark.parametrize("how", ["split", "freq", "generator"])
def test_whatever_data_is_validated_and_how_often(how, validate):
    def arguments():
        def batches():
            while True:
                yield X[:6], Y[:6]

        return {
            "split": {"validation_split": 0.25},
            "freq": {"validation_data": (X, Y), "validation_freq": [2, 3]},
            "generator": {"validation_data": batches(), "validation_steps": 2},
        }[how]

    plain, model, swa = dense(), dense(), SWA({"start": "1ep"}, validate=validate)
    expected = fit(plain, **arguments()).history
    one_shot = how == "generator" and validate == "both"
    with pytest.warns(SWAWarning, match="is a generator") if one_shot else nullcontext():
        history = fit(model, swa, **arguments()).history
    if validate == "both":
        assert history["val_loss"] == expected["val_loss"]
        assert len(history["val_swa_loss"]) == len(history["val_loss"])
        assert history["val_swa_mae"][-1] != history["val_mae"][-1]
    else:
        assert history.keys() == expected.keys()
        assert history["val_loss"][-1] != expected["val_loss"][-1]


def test_one_warning_for_a_generator():
    def batches():
        while True:
            yield X[:6], Y[:6]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(dense(), SWA(HALF), validation_data=batches(), validation_steps=2)
    assert sum(issubclass(w.category, SWAWarning) for w in caught) == 1


class OwnEvaluation(keras.Model):
    """A subclassed model with an evaluate and a test_step of its own."""

    def __init__(self):
        super().__init__()
        self.inside = keras.Sequential([keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])
        self.asked = []

    def call(self, x, training=None):
        return self.inside(x)

    def evaluate(self, x=None, y=None, return_dict=False, callbacks=None, **kwargs):
        self.asked.append(sorted(kwargs))
        found = super().evaluate(x, y, return_dict=True, callbacks=callbacks, **kwargs)
        found = {"doubled": 2 * found["loss"]}
        return found if return_dict else list(found.values())

    def test_step(self, *arguments):
        return super().test_step(*arguments)


def test_a_model_with_an_evaluate_of_its_own():
    keras.utils.set_random_seed(7)
    model = OwnEvaluation()
    model(X)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    swa = SWA({"start": "1ep"})
    history = fit(model, swa, validation_data=(X, Y)).history
    assert set(history) == {"loss", "val_doubled", "val_swa_doubled"}
    # The second time it is asked as the first time, which is as Keras asks.
    assert model.asked[0] == model.asked[1]
    assert "verbose" not in model.asked[0]
    last = model.evaluate(X, Y, verbose=0)
    assert last == [pytest.approx(history["val_swa_doubled"][-1], rel=1e-5)]
    assert model.evaluate(X, Y, verbose=0, return_dict=True) == {"doubled": last[0]}


def test_an_evaluate_that_somebody_else_has_wrapped_is_called_and_given_back():
    model, calls = dense(), []
    own = model.evaluate

    def wrapped(*args, **kwargs):
        calls.append(kwargs)
        return own(*args, **kwargs)

    vars(model)["evaluate"] = wrapped
    fit(model, SWA({"start": "1ep"}), validation_data=(X, Y), epochs=2)
    assert len(calls) == 4
    assert model.evaluate is wrapped


def test_after_a_validation_the_metrics_are_those_of_the_training_weights():
    def metrics(*callbacks):
        model, seen = dense(), []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(
                {name: float(array(v)) for name, v in model.get_metrics_result().items()}
            )
        )
        fit(model, look, *callbacks, validation_data=(X, Y), epochs=2)
        return seen

    assert metrics(SWA({"start": "1ep"})) == metrics()


class Counted(keras.utils.PyDataset):
    """Training data that counts how often it is read."""

    reads = 0

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        Counted.reads += index == 0
        return X[6 * index : 6 * index + 6], Y[6 * index : 6 * index + 6]


@pytest.mark.parametrize("bn_validate", [True, False])
def test_what_recomputing_batch_norm_for_validation_costs(bn_validate):
    Counted.reads = 0
    swa = SWA({"start": "1ep", "every": "2ep"}, bn_data=Counted(), bn_validate=bn_validate)
    model = with_batch_norm()
    history = fit(model, swa, validation_data=(X, Y)).history
    assert swa.n_averaged == 2
    # Once for each average that was validated, four times in all: the second serves the end too.
    assert Counted.reads == (2 if bn_validate else 1)
    final = model.evaluate(X, Y, verbose=0)[0]
    assert (history["val_swa_loss"][-1] == pytest.approx(final, rel=1e-5)) == bn_validate


def test_validation_without_recomputing_uses_the_statistics_of_the_training():
    plain, model = with_batch_norm(), with_batch_norm()
    fit(plain, validation_data=(X, Y))
    swa = SWA({"start": "1ep"}, bn_data=(X, Y), bn_validate=False, finalize=False)
    history = fit(model, swa, validation_data=(X, Y)).history
    for variable, value in zip(plain.trainable_variables, swa.averaged_weights, strict=True):
        variable.assign(value)
    assert history["val_swa_loss"][-1] == pytest.approx(
        plain.evaluate(X, Y, verbose=0)[0], rel=1e-5
    )
