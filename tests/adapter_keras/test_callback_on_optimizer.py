"""SWA() without a configuration: what the callback does with the average of a SWAOptimizer."""

from __future__ import annotations

import pickle

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    X,
    Y,
    close,
    dense,
    everything,
    fit,
    same,
    weights,
    with_batch_norm,
)

from swa_core import (
    EMA,
    NothingAveragedError,
    StateError,
    SWAConfig,
    SWAError,
    SwappedError,
    SWAWarning,
)
from swa_keras import SWA, SWAOptimizer

EVERY = SWAConfig(start="2step", every="1step", rule=EMA(0.9))


def averaging(config=EVERY, **lengths):
    return SWAOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), config, **lengths)


def test_it_validates_on_the_average_and_ends_on_it():
    one, other = dense(averaging()), dense()
    following, counting = SWA(), SWA(EVERY)
    one_logs = fit(one, following, validation_data=(X, Y)).history
    other_logs = fit(other, counting, validation_data=(X, Y)).history
    assert following.config == EVERY
    assert (following.schedule, following.updates) == (counting.schedule, 16)
    assert (following.n_averaged, following.n_skipped) == (15, 0)
    close(following.averaged_weights, counting.averaged_weights)
    same(following.averaged_weights, one.optimizer.averaged_weights)
    same(weights(one), one.optimizer.averaged_weights)
    assert one_logs.keys() == other_logs.keys()
    for name, values in one_logs.items():
        np.testing.assert_allclose(values, other_logs[name], rtol=1e-5)


def test_the_training_stays_what_it_was():
    plain, model = with_batch_norm(), with_batch_norm(averaging())
    fit(plain, validation_data=(X, Y))
    swa = SWA(bn_data=(X, Y), finalize=False)
    fit(model, swa, validation_data=(X, Y))
    same(weights(model), weights(plain))
    for bn_data in (None, (X, Y)):  # the callback's data serve the optimizer too
        with model.optimizer.averaged(model, bn_data=bn_data):
            predicted = model.predict(X, verbose=0)
        with swa.averaged():
            np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)


def test_it_is_read_in_fit_by_other_callbacks():
    swa, seen = SWA(validate="raw"), []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append((swa.updates, swa.n_averaged))
    )
    fit(dense(averaging()), swa, count)
    assert seen == [(n, n - 1) for n in range(1, 17)]


def test_under_a_loss_scaling_optimizer():
    optimizer = averaging()
    model = dense(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0))
    swa = SWA(finalize=False)
    fit(model, swa)
    assert swa.n_averaged == optimizer.n_averaged == 15
    with swa.averaged():
        same(weights(model), optimizer.averaged_weights)


def test_beside_it_another_callback_has_an_average_of_its_own():
    other = SWA({"start": "4step", "every": "4step"}, validate="raw", finalize=False)
    model, swa = dense(averaging()), SWA()
    fit(model, swa, other)
    assert (swa.n_averaged, other.n_averaged) == (15, 4)
    same(weights(model), swa.averaged_weights)


def test_its_state_is_the_optimizers(tmp_path):
    model, swa = dense(averaging()), SWA(finalize=False)
    fit(model, swa)
    state = pickle.loads(pickle.dumps(swa.state_dict()))
    fresh, again = dense(averaging()), SWA()
    fresh.optimizer.build(fresh.trainable_variables)
    with pytest.raises(SWAError, match="no average of its own to load into"):
        again.load_state_dict(state)
    again.begin(fresh)
    again.load_state_dict(state)
    assert fresh.optimizer.updates == 16
    same(fresh.optimizer.averaged_weights, model.optimizer.averaged_weights)
    # Either class goes on from what the other has saved.
    counting = SWA(EVERY)
    counting.load_state_dict(state)
    same(counting.averaged_weights, swa.averaged_weights)
    fresh.optimizer.load_state_dict(counting.state_dict(), fresh)
    swa.save(tmp_path / "average.safetensors")
    from_file = SWA.load(tmp_path / "average.safetensors")
    assert from_file.config == EVERY
    same(from_file.averaged_weights, swa.averaged_weights)


def test_saved_while_swapped_in_it_gives_the_training_weights_back():
    model, swa = dense(averaging()), SWA(finalize=False)
    fit(model, swa)
    live = weights(model)
    with swa.averaged():
        state, held = swa.state_dict(), model.get_weights()
    fresh, again = dense(averaging()), SWA()
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.set_weights(held)
    again.begin(fresh)
    again.load_state_dict(state)
    same(weights(fresh), live)
    same(again.averaged_weights, swa.averaged_weights)


def test_several_fits_and_a_pickled_callback():
    model, swa = dense(averaging()), pickle.loads(pickle.dumps(SWA(finalize=False)))
    fit(model, swa, epochs=2)
    fit(model, swa, epochs=2)
    assert swa.n_averaged == 15
    whole = dense(averaging())
    fit(whole, SWA(finalize=False), epochs=2)
    fit(whole, SWA(finalize=False), epochs=2)
    same(everything(model), everything(whole))


# Bad input


def test_without_an_averaging_optimizer_it_is_refused():
    with pytest.raises(SWAError, match=r"optimizer is SGD(.|\n)*Hint: say SWA\(config\), or comp"):
        fit(dense(), SWA())
    with pytest.raises(SWAError, match="no model yet"):
        SWA().finalize()


def test_what_the_optimizer_does_by_itself_is_refused():
    model, swa = dense(averaging()), SWA()
    with pytest.raises(SWAError, match="give the lengths to SWAOptimizer"):
        swa.begin(model, steps_per_epoch=4)
    with pytest.raises(SWAError, match=r"leave out swa.update\(model\)"):
        swa.update(model)
    with pytest.raises(NothingAveragedError, match="nothing is averaged yet after 0 updates"):
        swa.finalize(model)
    late = dense(averaging(SWAConfig(start="99step", every="1step")))
    with pytest.warns(SWAWarning, match="no snapshot was averaged in 16 updates"):
        fit(late, SWA())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(StateError, match="counted epochs"):
        swa.load_state_dict(swa.state_dict() | {"unit": "epoch"})


def test_training_while_swapped_in_is_refused():
    """Also where the step was compiled long before, and without the callback in the list."""
    model, swa = dense(averaging()), SWA(finalize=False)
    fit(model, swa)
    state = everything(model)
    with swa.averaged():
        with pytest.raises(SwappedError, match=r"cannot train inside averaged\(\)"):
            fit(model)
        with pytest.raises(SwappedError, match=r"cannot train inside averaged\(\)"):
            model.train_on_batch(X, Y)
        model.evaluate(X, Y, verbose=0)
    same(everything(model), state)
    fit(model, epochs=1)
