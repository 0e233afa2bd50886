"""Swapping, finalizing, saving and resuming, the learning rate, loops without fit, bad input."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, dense, everything, fit, same, weights

from swa_core import (
    EMA,
    ConfigError,
    LearningRate,
    NothingAveragedError,
    Schedule,
    StateError,
    StructureError,
    SWAConfig,
    SWAError,
    SwappedError,
    SWAWarning,
    learning_rate,
)
from swa_keras import SWA

EVERY_STEP = {"start": "1step", "every": "1step"}


def trained(**arguments):
    model, swa = dense(), SWA(EVERY_STEP, finalize=False, **arguments)
    fit(model, swa)
    return model, swa


def test_fit_ends_on_the_average_unless_told_not_to():
    model, swa = dense(), SWA(EVERY_STEP)
    fit(model, swa)
    same(weights(model), swa.averaged_weights)
    model, swa = trained()
    with pytest.raises(AssertionError):
        same(weights(model), swa.averaged_weights)


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_averaged_restores_everything(raised):
    model, swa = trained()
    before = everything(model)
    with nullcontext() if raised is None else pytest.raises(raised), swa.averaged() as inside:
        assert inside is model
        same(weights(model), swa.averaged_weights)
        predicted = model.predict(X, verbose=0)
        model.evaluate(X, Y, verbose=0)
        if raised:
            raise raised
    same(everything(model), before)
    swa.finalize()
    np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)


def test_averaged_into_another_model_of_the_same_structure():
    _, swa = trained()
    other = dense()
    swa.finalize(other)
    same(weights(other), swa.averaged_weights)


def test_evaluating_another_model_with_the_callback_changes_nothing_of_ours():
    model, swa = trained()
    other = dense()
    before = weights(other)
    other.evaluate(X, Y, verbose=0, callbacks=[swa])
    swa.finalize()
    same(weights(model), swa.averaged_weights)
    same(weights(other), before)


def test_with_nothing_averaged():
    model, swa = dense(), SWA({"start": "99step", "every": "1step"}, validate="raw")
    before = weights(model)
    with pytest.raises(SWAError, match="no model yet"):
        _ = swa.averaged_weights
    swa.begin(model)
    with pytest.warns(SWAWarning, match="nothing is averaged yet"):
        same(swa.averaged_weights, before)
    with swa.averaged():  # a second warning would be an error
        same(weights(model), before)
    with pytest.raises(NothingAveragedError, match="nothing is averaged yet after 0") as error:
        swa.finalize()
    assert "Hint: train past the first snapshot (the schedule is Sched" in str(error.value)
    with pytest.raises(NothingAveragedError, match="Hint: train past the first snapshot, or"):
        SWA(EVERY_STEP).finalize(model)


def test_the_end_of_a_training_without_a_snapshot_warns_and_keeps_the_weights():
    plain, model = dense(), dense()
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    fit(plain, epochs=1)
    with pytest.warns(SWAWarning, match="no snapshot was averaged in 4 updates"):
        fit(model, SWA({"start": "3ep"}), stop)
    same(weights(model), weights(plain))


def test_inside_averaged_nothing_else_is_allowed():
    model, swa = trained()
    before = weights(model)
    with swa.averaged():
        for forbidden in (
            lambda: fit(model, swa),
            lambda: swa.update(model),
            swa.finalize,
            lambda: swa.averaged().__enter__(),
            lambda: swa.load_state_dict(swa.state_dict()),
        ):
            with pytest.raises(SwappedError, match=r"inside averaged\(\)"):
                forbidden()
    same(weights(model), before)


class Interrupt(keras.callbacks.Callback):
    """Saves what a user would, before or after our callback, and stops the training there."""

    def __init__(self, swa, at, model):
        super().__init__()
        self.swa, self.at, self.seen, self.owner = swa, at, 0, model

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.at:
            self.model  # noqa: B018 - syncs on jax
            self.saved = (everything(self.owner), pickle.dumps(self.swa.state_dict()))
            raise KeyboardInterrupt


def ordered(model, *callbacks, **arguments):
    """fit without shuffling, so that a training can go on where another one stopped."""
    return fit(model, *callbacks, shuffle=False, **arguments)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("at", [3, 4, 10, 12])
def test_an_interrupted_training_goes_on_bit_for_bit(at, ours_first):
    x, y = np.tile(X, (4, 1)), np.tile(Y, (4, 1))  # 16 batches, one epoch
    config = SWAConfig(start="4step", every="4step", rule=EMA(0.5))
    whole, reference = SWA(config, finalize=False), dense()
    reference.fit(x, y, batch_size=6, shuffle=False, verbose=0, callbacks=[whole])
    model, swa = dense(), SWA(config, finalize=False)
    interrupt = Interrupt(swa, at, model)
    callbacks = [swa, interrupt] if ours_first else [interrupt, swa]
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=6, shuffle=False, verbose=0, callbacks=callbacks)
    values, state = interrupt.saved
    model, swa = dense(), SWA(config, finalize=False)
    model.optimizer.build(model.trainable_variables)
    found = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]
    for variable, value in zip(found, values, strict=True):
        variable.assign(value)
    swa.load_state_dict(pickle.loads(state))
    x, y = x[6 * at :], y[6 * at :]
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0, callbacks=[swa])
    same(weights(model), weights(reference))
    same(swa.averaged_weights, whole.averaged_weights)
    assert (swa.n_averaged, swa.state_dict()["n_updates"]) == (4, 16)


def test_a_resumed_fit_with_initial_epoch():
    config = {"start": "50%", "every": "1ep"}
    whole, reference = SWA(config), dense()
    ordered(reference, whole)
    model, swa = dense(), SWA(config, finalize=False)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 2)
    )
    ordered(model, swa, stop)
    saved = swa.state_dict()
    resumed = SWA(config)
    resumed.load_state_dict(saved)
    ordered(model, resumed, initial_epoch=3)
    same(resumed.averaged_weights, whole.averaged_weights)
    same(weights(model), weights(reference))


def test_a_state_saved_while_swapped_in_gives_the_training_weights_back():
    model, swa = trained()
    with swa.averaged():
        saved_model, saved = model.get_weights(), swa.state_dict()
    other, again = dense(), SWA(EVERY_STEP, finalize=False)
    other.set_weights(saved_model)
    again.load_state_dict(saved)
    same(again.averaged_weights, swa.averaged_weights)
    again.begin(other)
    same(weights(other), weights(model))


def test_a_loaded_state_needs_no_training_to_be_used():
    _, swa = trained()
    again, model = SWA(EVERY_STEP), dense()
    again.load_state_dict(swa.state_dict())
    same(again.averaged_weights, swa.averaged_weights)
    with again.averaged(model):
        same(weights(model), swa.averaged_weights)


def test_a_bad_state_is_refused_and_nothing_changes():
    model, swa = trained()
    saved, before = swa.state_dict(), swa.averaged_weights
    bad = {
        "has no version": {},
        "has version 99": saved | {"version": 99},
        "arrays are missing": {k: v for k, v in saved.items() if k != "average"},
        "3 arrays for 4 weights": saved | {"average": saved["average"][:3]},
        "made with rule": saved | {"rule": {"name": "ema", "decay": 0.5}},
        "made with schedule": saved | {"schedule": [5, 1, None]},
        "counted epochs": saved | {"unit": "epoch"},
        "epochs missing": {k: v for k, v in saved.items() if k != "epochs"},
        "rule, live missing": {k: v for k, v in saved.items() if k not in ("rule", "live")},
        "schedule missing": {k: v for k, v in saved.items() if k != "schedule"},
        "epochs is 'x'": saved | {"epochs": "x"},
        "epochs is -1": saved | {"epochs": -1},
        "base_rate 'x'": saved | {"base_rate": "x"},
        "base_rate nan": saved | {"base_rate": float("nan")},
        "what is no array": saved | {"average": [[[1.0], [1.0, 2.0]], *saved["average"][1:]]},
        "weights are no arrays": saved | {"live": {"weights": [[1, [2]]], "state": []}},
    }
    everything = repr(saved)
    for message, state in bad.items():
        with pytest.raises(StateError, match=message):
            swa.load_state_dict(state)
        assert repr(swa.state_dict()) == everything
    transposed = [array.T.copy() for array in saved["average"]]
    with pytest.raises(StructureError, match="has shape"):
        swa.load_state_dict(saved | {"average": transposed})
    same(swa.averaged_weights, before)
    # What only the training can tell is refused at its beginning.
    late = SWA({"start": "2step", "every": "1step"})
    late.load_state_dict(saved | {"schedule": None})
    late = SWA({"start": "2step", "every": "1step"})
    late.load_state_dict(saved)
    with pytest.raises(StateError, match="made with schedule"):
        fit(model, late)


def test_a_changed_model_is_refused_with_the_path():
    model, swa = trained()
    average = swa.averaged_weights
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    with pytest.raises(StructureError, match=r"leaf '.*kernel'"):
        fit(model, swa)
    wider = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(1)]
    )
    wider.compile("sgd", "mse")
    for use in (lambda: fit(wider, swa), lambda: swa.finalize(wider), lambda: swa.update(wider)):
        with pytest.raises(StructureError, match=r"kernel' has shape \(4, 6\).*\(4, 5\)"):
            use()
    same(swa.averaged_weights, average)


def test_a_callback_is_pickled_and_copied_before_training():
    for again in (
        pickle.loads(pickle.dumps(SWA(EVERY_STEP))),
        copy.deepcopy(SWA(EVERY_STEP)),
    ):
        fit(dense(), again)
        assert again.n_averaged == 16


# Loops without fit


def test_update_in_a_loop_of_ones_own():
    model, swa = dense(), SWA({"start": "50%", "every": "1ep"})
    swa.begin(model, steps_per_epoch=4, total_steps=16)
    seen = []
    for step in range(16):
        begin = 6 * (step % 4)
        model.train_on_batch(X[begin : begin + 6], Y[begin : begin + 6])
        swa.update(model)
        if step + 1 in (8, 12, 16):
            seen.append(weights(model))
    assert swa.n_averaged == 3
    expected = [np.mean(w, axis=0) for w in zip(*seen, strict=True)]
    for a, b in zip(swa.averaged_weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_update_without_begin_needs_times_in_steps():
    with pytest.raises(ConfigError, match="steps_per_epoch is needed"):
        SWA({}).update(dense())


# The learning rate


class Rates(keras.callbacks.Callback):
    """The rate that made each update."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(array(self.model.optimizer.learning_rate)))


@pytest.mark.parametrize(
    "lr",
    [
        LearningRate(value=0.01),
        LearningRate(value=0.01, anneal="1ep", shape="linear"),
        LearningRate(value=0.02, cycle="2step", low=0.005),
    ],
)
def test_the_rate_of_every_update_is_the_cores(lr):
    config = SWAConfig(start="2ep", every="1ep", lr=lr)
    rates = Rates()
    fit(dense(), SWA(config), rates)
    schedule = config.lr_schedule(steps_per_epoch=4, total_steps=16)
    expected = [float(learning_rate(u, 0.05, schedule)) for u in range(1, 17)]
    np.testing.assert_allclose(rates.rates, expected, rtol=1e-6)


def test_the_rate_with_gradient_accumulation_and_loss_scaling():
    config = SWAConfig(start="2step", every="1step", lr=LearningRate(value=0.01, anneal="4step"))
    expected = [
        float(learning_rate(u, 0.05, config.lr_schedule(steps_per_epoch=2, total_steps=8)))
        for u in range(1, 9)
    ]
    rates = Rates()
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    fit(dense(optimizer), SWA(config), rates)
    np.testing.assert_allclose(rates.rates[1::2], expected, rtol=1e-6)
    rates = Rates()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=2.0)
    fit(dense(optimizer), SWA(config), rates)
    np.testing.assert_allclose(rates.rates[:8], expected, rtol=1e-6)


def test_the_rate_wins_over_a_callback_at_the_epochs_ends():
    rates = Rates()
    other = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5)
    with pytest.warns(SWAWarning, match="something set the learning rate to 0.5"):
        fit(dense(), SWA({"start": "2ep", "lr": {"value": 0.01}}), other, rates, epochs=4)
    np.testing.assert_allclose(rates.rates, [0.5] * 8 + [0.01] * 8, rtol=1e-6)


def test_a_rate_that_cannot_be_set_is_refused():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = dense(keras.optimizers.SGD(schedule))
    with pytest.raises(SWAError, match="ExponentialDecay, which cannot be set"):
        fit(model, SWA({"start": "50%", "lr": {"value": 0.01}}))
    fit(model, SWA({"start": "50%"}))


# Bad input


def test_use_ema_is_refused():
    model = dense(keras.optimizers.SGD(0.1, use_ema=True))
    with pytest.raises(SWAError, match="use_ema=True"):
        fit(model, SWA({}))


def test_bad_arguments_are_reported_together():
    with pytest.raises(ConfigError, match="validate: expected") as caught:
        SWA({}, validate="all", bn_data=iter([X]))
    assert [fault.path for fault in caught.value.faults] == ["validate", "bn_data"]
    with pytest.raises(ConfigError, match='Did you mean "every"'):
        SWA({"evry": "1ep"})
    with pytest.raises(TypeError, match="SWAConfig"):
        SWA(3)


def test_a_file_is_taken_for_a_configuration(tmp_path):
    path = tmp_path / "swa.toml"
    SWAConfig(start="50%", every="2ep").dump(path)
    swa = SWA(path)
    fit(dense(), swa)
    assert swa.schedule == Schedule(8, 8)


def test_a_model_without_trainable_weights_is_refused():
    model = dense()
    model.trainable = False
    swa = SWA(EVERY_STEP)
    with pytest.raises(StructureError, match="no trainable floating-point weights"):
        swa.update(model)
    model.compile("sgd", "mse")
    with pytest.raises(StructureError, match="no trainable floating-point weights"):
        fit(model, SWA(EVERY_STEP))


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.Dense(1)])
    swa = SWA(EVERY_STEP)
    with pytest.raises(SWAError, match="not built"):
        swa.averaged(model).__enter__()


class OwnOptimizer(keras.Model):
    """Trains with another optimizer than the one it was compiled with."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, *arguments):
        if len(arguments) == 2:  # jax: state, data
            return {"loss": 0.0}, arguments[0]
        return {"loss": 0.0}


def test_a_train_step_that_leaves_the_models_optimizer_alone_is_refused():
    model = OwnOptimizer()
    model.compile("sgd", "mse", jit_compile=False)
    model(X)
    with pytest.raises(SWAError, match="made no update in 4 batches"):
        fit(model, SWA({"start": "2step", "every": "1step"}))
