"""Models in ``fit``: not built yet, changed in between, several with one callback, and several
callbacks on one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    Updates,
    X,
    Y,
    averages,
    compiled,
    dense,
    fit,
    same,
    weights,
)

from swa_core import ConfigError, Schedule, StructureError, SWAError
from swa_keras import SWA

EVERY_STEP = {"start": "1step", "every": "1step"}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))


def sequential():
    return keras.Sequential([keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])


@pytest.mark.parametrize("make", [sequential, Subclassed])
def test_a_model_that_the_first_batch_builds(make):
    keras.utils.set_random_seed(7)
    updates, swa = Updates(), SWA({"start": "3step", "every": "2step"})
    model = compiled(make())
    fit(model, updates, swa, validation_data=(X, Y))
    assert len(updates.after) == 16
    averages(swa, updates.after)
    same(weights(model), swa.averaged_weights)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("start", ["1step", "9step"])
def test_a_model_that_turns_out_to_have_nothing_to_train(start):
    model = sequential()
    model.trainable = False
    with pytest.raises(StructureError, match="no trainable floating-point weights"):
        fit(compiled(model), SWA({"start": start, "every": "1step"}))


def test_before_the_first_update_there_is_no_average_of_zeros():
    # Keras' own averaging starts at zeros.
    values = []
    swa = SWA({"start": "2step", "every": "1step"}, finalize=False)
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: values.append(swa.averaged_weights)
    )
    updates = Updates()
    with pytest.warns(UserWarning, match="nothing is averaged yet; these are the live weights"):
        fit(dense(), updates, swa, hook, epochs=1)
    same(values[0], updates.after[1])
    same(values[1], updates.after[2])


def freeze(model):
    model.layers[0].trainable = False


def grow(model):
    model.add(keras.layers.Dense(1))


def unfreeze(model):
    model.layers[0].trainable = True


@pytest.mark.filterwarnings("ignore:SWA. no snapshot falls into this training")
@pytest.mark.parametrize(
    ("before", "change", "number"), [(None, freeze, 2), (freeze, unfreeze, 4), (None, grow, 6)]
)
def test_a_model_changed_between_fits(before, change, number):
    # Changing `trainable` after build makes fit fail with Keras' own averaging.
    model = dense()
    if before:
        before(model)
        compiled(model)
    early = SWA(EVERY_STEP, finalize=False)
    late = SWA({"start": "6step", "every": "1step"}, finalize=False, validate="raw")
    fit(model, early, late, epochs=1)
    change(model)
    compiled(model)
    average = early.averaged_weights
    with pytest.raises(StructureError, match=r"cannot go on averaging: leaf '.*(kernel|bias)'"):
        fit(model, early)
    same(early.averaged_weights, average)
    # Where nothing was averaged yet, the model may change.
    updates = Updates()
    fit(model, updates, late, epochs=2)
    assert len(late.averaged_weights) == number
    averages(late, updates.after, Schedule(2, 1))


def test_another_model_with_the_same_callback_is_refused():
    # A list of callbacks made outside of the loop over folds, for example.
    first, second = dense(), dense()
    swa = SWA(EVERY_STEP, finalize=False)
    fit(first, swa)
    before = swa.averaged_weights
    for go_on in (
        lambda: fit(second, swa),
        lambda: swa.update(second),
        lambda: swa.begin(second),
    ):
        with pytest.raises(StructureError, match="this is another model than the one that was"):
            go_on()
    assert "evaluate" not in vars(second)
    same(swa.averaged_weights, before)
    swa.finalize()  # the model that was trained
    same(weights(first), before)
    with swa.averaged(second):  # to use it there is allowed
        same(weights(second), before)
    # So it is where nothing is averaged yet, since updates are counted.
    late = SWA({"start": "99step"}, validate="raw")
    late.begin(dense(), steps_per_epoch=4)
    late.update(late.model)
    with pytest.raises(StructureError, match="another model"):
        late.update(dense())


def test_the_same_model_loaded_anew_goes_on_through_a_state(tmp_path):
    model, swa = dense(), SWA(EVERY_STEP, finalize=False)
    fit(model, swa, epochs=1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(StructureError, match="loaded anew"):
        fit(again, swa, epochs=1)
    resumed = SWA(EVERY_STEP, finalize=False)
    resumed.load_state_dict(swa.state_dict())
    fit(again, resumed, epochs=1, shuffle=False)
    assert resumed.n_averaged == resumed.updates == 8
    swa.load_state_dict(swa.state_dict())  # or the same callback
    fit(keras.models.load_model(tmp_path / "model.keras"), swa, epochs=1, shuffle=False)
    same(swa.averaged_weights, resumed.averaged_weights)


def test_a_callback_that_has_not_trained_is_not_bound_to_a_model():
    swa = SWA({"start": "1ep", "every": "1ep", "lr": {"value": 0.1}})
    broken = dense(keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 9, 0.9)))
    with pytest.raises(SWAError, match="cannot be set"):
        fit(broken, swa)
    fit(dense(), swa)
    assert swa.n_averaged == 4


def test_the_same_callback_listed_twice_is_refused():
    swa, model = SWA(EVERY_STEP), dense()
    before = weights(model)
    with pytest.raises(SWAError, match="listed twice"):
        fit(model, swa, swa, validation_data=(X, Y))
    same(weights(model), before)
    assert "evaluate" not in vars(model)
    fit(model, swa)  # once is fine, also after the error
    fit(model, swa)
    assert swa.n_averaged == 32


def test_two_callbacks_with_names_are_independent():
    alone = [SWA({"start": "50%", "every": "1ep"}), SWA({"start": "1step", "every": "3step"})]
    expected = [fit(dense(), swa, validation_data=(X, Y)).history for swa in alone]
    swa = SWA({"start": "50%", "every": "1ep"}, finalize=False)
    ema = SWA({"start": "1step", "every": "3step"}, name="ema")
    model = dense()
    history = fit(model, swa, ema, validation_data=(X, Y)).history
    assert set(history) == {
        f"{kind}{metric}"
        for kind in ("", "val_", "val_swa_", "val_ema_")
        for metric in ("loss", "mae")
    }
    for one, other in zip((swa, ema), alone, strict=True):
        same(one.averaged_weights, other.averaged_weights)
    np.testing.assert_allclose(history["val_swa_loss"], expected[0]["val_swa_loss"], rtol=1e-5)
    np.testing.assert_allclose(history["val_ema_loss"], expected[1]["val_swa_loss"], rtol=1e-5)
    same(weights(model), ema.averaged_weights)


@pytest.mark.parametrize("name", ["", "my average", 3, None])
def test_a_name_that_is_none(name):
    with pytest.raises(ConfigError, match="name: expected a name such as"):
        SWA({}, name=name)


def test_a_list_of_callbacks_driven_by_hand():
    updates, swa = Updates(), SWA({"start": "50%", "every": "1ep"})
    model = dense()
    callbacks = keras.callbacks.CallbackList([updates, swa], model=model, epochs=4, steps=4)
    callbacks.on_train_begin()
    for epoch in range(4):
        callbacks.on_epoch_begin(epoch)
        for step in range(4):
            callbacks.on_train_batch_begin(step)
            model.train_on_batch(X[6 * step : 6 * step + 6], Y[6 * step : 6 * step + 6])
            callbacks.on_train_batch_end(step)
        callbacks.on_epoch_end(epoch)
    callbacks.on_train_end()
    assert swa.schedule == Schedule(8, 4)
    averages(swa, updates.after)
    same(weights(model), swa.averaged_weights)
    # Without lengths, times in steps can be told, and shares cannot.
    callbacks = keras.callbacks.CallbackList([SWA({"start": "75%"})], model=model)
    with pytest.raises(ConfigError, match="total_steps is needed"):
        callbacks.on_train_begin()
