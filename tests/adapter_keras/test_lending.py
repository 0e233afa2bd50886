"""What a model does while it holds the average reaches neither the average nor the training."""

from __future__ import annotations

import importlib
import signal

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, dense, everything, fit, same, weights

from swa_core import BatchNormError, SWAError, SWAWarning
from swa_keras import SWA
from swa_keras.backend import current

EVERY_STEP = {"start": "1step", "every": "1step"}
BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def trained():
    model, swa = dense(), SWA(EVERY_STEP, finalize=False)
    fit(model, swa)
    return model, swa


def submodel(model):
    """Another model of the same variables."""
    return keras.Model(model.inputs, model.layers[0].output)


def trains_on_a_batch(model):
    model.train_on_batch(X, Y)


def fits(model):
    model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    model.evaluate(X, Y, verbose=0)


def assigns(model):
    for v in model.trainable_variables:
        v.assign(v * 0 + 3)
        v.assign_add(v)


def sets_weights(model):
    model.set_weights([w * 0 for w in model.get_weights()])


def evaluates_and_predicts(model):
    for _ in range(2):
        model.evaluate(X, Y, verbose=0)
        model.predict(X, verbose=0)
        model.test_on_batch(X, Y)
        model.predict_on_batch(X)


def uses_a_model_of_its_layers(model):
    submodel(model).predict(X, verbose=0)
    other = submodel(model)
    other.compile("sgd", "mse")
    other.fit(X, np.zeros((24, 5), "float32"), verbose=0)


def compiles_again(model):
    model.compile(model.optimizer, "mse", metrics=["mae"])
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)


def is_interrupted(model):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    model.evaluate(
        X, Y, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_test_batch_end=interrupt)]
    )


def is_interrupted_in_training(model):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    model.fit(
        X, Y, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)]
    )


def another_average(model):
    other = SWA(EVERY_STEP)
    other.update(model)
    assigns(model)
    other.update(model)
    with other.averaged(model):
        assigns(model)


@pytest.mark.parametrize(
    "use",
    [
        trains_on_a_batch,
        fits,
        assigns,
        sets_weights,
        evaluates_and_predicts,
        uses_a_model_of_its_layers,
        compiles_again,
        is_interrupted,
        is_interrupted_in_training,
        another_average,
    ],
)
def test_whatever_is_done_inside_the_average_and_the_weights_come_back(trained, use):
    model, swa = trained
    live, average = weights(model), swa.averaged_weights
    raised = "interrupted" in use.__name__
    for _ in range(2):
        try:
            with swa.averaged():
                same(weights(model), average)
                use(model)
                same(swa.averaged_weights, average)
            assert not raised
        except KeyboardInterrupt:
            assert raised
        same(weights(model), live)
        same(swa.averaged_weights, average)
    fit(model, epochs=1)  # and the training goes on
    same(swa.averaged_weights, average)


def test_a_model_that_held_the_average_trains_and_evaluates_as_one_that_never_did(trained):
    _, swa = trained
    plain, lent = dense(), dense()
    plain.evaluate(X, Y, verbose=0)  # which is not without effect on torch
    with swa.averaged(lent):
        lent.evaluate(X, Y, verbose=0)
    for model in (plain, lent):
        fit(model, validation_data=(X, Y))
    same(everything(lent), everything(plain))
    assert plain.evaluate(X, Y, verbose=0) == lent.evaluate(X, Y, verbose=0)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="a variable's memory cannot be written to")
def test_memory_that_is_written_to_or_taken_away_is_noticed():
    model, swa = dense(), SWA(EVERY_STEP, finalize=False)
    fit(model, swa, epochs=1)
    live = weights(model)
    values = [v.value for v in model.trainable_variables]

    def write():
        with swa.averaged():
            values[1].detach().add_(1)

    def donate():
        step = importlib.import_module("jax").jit(lambda v: [v[0] + 1], donate_argnums=0)
        with swa.averaged():
            step([v.value for v in model.trainable_variables])

    if BACKEND == "torch":
        with pytest.warns(SWAWarning, match="written to in their memory"):
            write()
    else:
        for _ in range(2):  # what is lost stays lost, and says so again
            with pytest.raises(SWAError, match=r"Hint: inside averaged\(\), give"):
                donate()
            same(weights(model), live)
    fit(model, epochs=1)


def test_an_interrupt_waits_for_the_end_of_a_snapshot(monkeypatch):
    model, whole = dense(), SWA(EVERY_STEP)
    swa = SWA(EVERY_STEP)
    whole.update(model)
    swa.update(model)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    lerp = type(current()).lerp

    def interrupted(*arguments):
        result = lerp(*arguments)
        signal.raise_signal(signal.SIGINT)
        return result

    model.trainable_variables[0].assign_add(np.ones((4, 5), "float32"))
    whole.update(model)
    try:
        monkeypatch.setattr(type(current()), "lerp", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swa.update(model)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (swa.n_averaged, swa.updates) == (2, 2)
    assert repr(swa.state_dict()) == repr(whole.state_dict())
    same(swa.averaged_weights, whole.averaged_weights)


def addresses(model):
    """Where the values of the trainable variables are."""
    values = [v.value for v in model.trainable_variables]
    if BACKEND == "torch":
        return [value.data_ptr() for value in values]
    if BACKEND == "jax":
        return [value.unsafe_buffer_pointer() for value in values]
    return [np.asarray(memoryview(value.read_value())).ctypes.data for value in values]


def test_no_memory_but_that_of_the_weights_and_the_average():
    """Two addresses for each variable, whichever side it holds."""
    # (tensorflow aligns what is shared, and copies what is small.)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    model.compile("sgd", "mse")
    x = np.ones((8, 64), "float32")
    swa = SWA(EVERY_STEP, finalize=False)
    model.fit(x, x, verbose=0, callbacks=[swa])
    before = addresses(model)
    held = [set() for _ in before]
    for _ in range(3):
        with swa.averaged():
            for use in (lambda: None, lambda: model.evaluate(x, x, verbose=0)):
                use()
                model.predict(x, verbose=0)
                for seen, address in zip(held, addresses(model), strict=True):
                    seen.add(address)
    assert addresses(model) == before
    assert all(len(seen) == 1 for seen in held)
    if BACKEND == "torch":  # which has exchanged values, and no addresses
        assert [*map(set, zip(before, strict=True))] == held


def test_an_interrupt_waits_for_the_end_of_a_swap(monkeypatch):
    model, swa = dense(), SWA(EVERY_STEP, finalize=False)
    fit(model, swa, epochs=1)
    live, average = weights(model), swa.averaged_weights
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    kind = type(current())
    ways = {"lend": [], "assign": [True]}  # in and out: what has been done when it comes
    done = []

    def interrupted(method):
        def wrapper(*arguments):
            signal.raise_signal(signal.SIGINT)
            return method(*arguments)

        return wrapper

    def use():
        with swa.averaged():
            done.append(True)

    try:
        for name, expected in ways.items():
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, interrupted(getattr(kind, name)))
                with pytest.raises(KeyboardInterrupt):
                    use()
            assert done == expected
            same(weights(model), live)
            same(swa.averaged_weights, average)
    finally:
        signal.signal(signal.SIGINT, handler)
    swa.finalize()  # which would be refused inside averaged()
    same(weights(model), average)


def test_an_error_while_the_average_is_made_ready_to_stay(trained):
    model, swa = trained
    live, average = weights(model), swa.averaged_weights
    with_batch_norm = keras.Sequential(
        [model, keras.layers.BatchNormalization(center=False, scale=False)]
    )
    with pytest.raises(BatchNormError, match="held no batch"):
        swa.finalize(with_batch_norm, bn_data=[])
    same(weights(model), live)
    same(swa.averaged_weights, average)
