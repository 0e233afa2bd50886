"""``[swa.lr]`` when other callbacks set the rate too: from the start on ours stays, said once."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import array, dense, fit, same, weights

from swa_core import LearningRate, SWAConfig, SWAWarning, learning_rate
from swa_keras import SWA

CONFIG = SWAConfig(start="2ep", every="1ep", lr=LearningRate(value=0.01, anneal="1ep"))
HOOKS = ("on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end")


class Rates(keras.callbacks.Callback):
    """The rate that made each update."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(array(self.model.optimizer.learning_rate)))


def setting(model, hook, rate=0.5):
    """A user's callback that sets the rate."""

    def set_it(number, logs=None):
        assert model.built
        model.optimizer.learning_rate = rate

    return keras.callbacks.LambdaCallback(**{hook: set_it})


def core_rates(base, number=16):
    lr = CONFIG.lr_schedule(steps_per_epoch=4, total_steps=16)
    return [float(learning_rate(u, base, lr)) for u in range(1, number + 1)]


@pytest.mark.parametrize("hook", HOOKS)
def test_ours_makes_every_update_wherever_the_other_one_stands(hook):
    for ours_first in (True, False):
        model = dense()
        swa, rates, other = SWA(CONFIG), Rates(), setting(model, hook)
        callbacks = [swa, other] if ours_first else [other, swa]
        with pytest.warns(SWAWarning, match=r"set the learning rate to 0.5, but from") as caught:
            fit(model, rates, *callbacks)
        assert sum(issubclass(warning.category, SWAWarning) for warning in caught) == 1
        np.testing.assert_allclose(rates.rates[8:], core_rates(0.5)[8:], rtol=1e-6)
        # Afterwards the rate is the user's again.
        model.optimizer.learning_rate = 0.25
        assert float(array(model.optimizer.learning_rate)) == 0.25


def test_a_scheduler_and_a_plateau():
    model, rates = dense(), Rates()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.2)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=0, min_delta=1e9)
    with pytest.warns(SWAWarning, match="set the learning rate"):
        fit(model, scheduler, SWA(CONFIG), plateau, rates)
    np.testing.assert_allclose(rates.rates[8:], core_rates(0.2)[8:], rtol=1e-6)


def test_a_callback_that_sets_what_is_there_anyway_is_not_spoken_of():
    model = dense()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: float(rate))
    fit(model, scheduler, SWA(CONFIG))


@pytest.mark.parametrize("inner", ["accumulating", "scaled"])
def test_with_accumulation_and_loss_scaling(inner):
    config = SWAConfig(start="2step", every="1step", lr=LearningRate(value=0.01, anneal="2step"))
    if inner == "scaled":
        sgd = keras.optimizers.SGD(0.05)
        optimizer = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0)
    else:
        optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    model, rates = dense(optimizer), Rates()
    with pytest.warns(SWAWarning, match="set the learning rate to 0.5"):
        fit(model, SWA(config), setting(model, "on_train_batch_end"), rates, epochs=2)
    found = rates.rates if inner == "scaled" else rates.rates[1::2]
    # The rate that made an update is read after it, before the other callback sets its own.
    expected = [
        float(learning_rate(u, 0.5, config.lr_schedule())) for u in range(1, len(found) + 1)
    ]
    np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-6)


def test_under_steps_per_execution():
    if keras.backend.backend() == "torch":
        pytest.skip("torch runs one step at a time")
    config = SWAConfig(start="2ep", every="1ep", lr=LearningRate(value=0.01))
    found = []
    for others in (False, True):
        model = dense(steps_per_execution=2)
        others = [setting(model, "on_train_batch_begin", 0.05)] if others else []
        if others:
            with pytest.warns(SWAWarning, match="set the learning rate to 0.05"):
                fit(model, SWA(config, finalize=False), *others)
        else:
            fit(model, SWA(config, finalize=False))
        found.append(weights(model))
    same(*found)


def test_after_an_interrupted_fit_the_user_sets_the_rate():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3 and float(array(self.model.optimizer.learning_rate)) < 0.02:
                raise KeyboardInterrupt

    model, swa = dense(), SWA(CONFIG, finalize=False)
    with pytest.raises(KeyboardInterrupt):
        fit(model, swa, Interrupt())
    model.optimizer.learning_rate = 0.25
    assert float(array(model.optimizer.learning_rate)) == 0.25
    rates = Rates()
    fit(model, rates, epochs=1)
    assert rates.rates == [0.25] * 4


def test_after_an_interrupted_fit_another_fit_sets_the_rate():
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    model = dense()
    with pytest.raises(KeyboardInterrupt):
        fit(model, SWA(CONFIG, finalize=False), Interrupt())
    rates = Rates()
    fit(model, keras.callbacks.LearningRateScheduler(lambda epoch: 0.25), rates, epochs=1)
    assert rates.rates == [0.25] * 4
