"""Snapshots in ``fit``: the right updates, the core's average, and a training left as it is."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    STEPS,
    Recorder,
    X,
    Y,
    close,
    core_average,
    dense,
    everything,
    fit,
    same,
    stream,
    weights,
    with_batch_norm,
)

import swa_core
from swa_core import EMA, ConfigError, Polynomial, Schedule, SWAConfig, SWAWarning
from swa_keras import SWA


@pytest.mark.parametrize(
    ("start", "every", "rule"),
    [
        ("7step", "3step", swa_core.Uniform()),
        ("50%", "1ep", Polynomial(eta=1)),
        ("1ep", "1step", EMA(0.5)),
    ],
)
def test_the_average_is_the_cores_on_the_weights_of_the_scheduled_updates(start, every, rule):
    recorder, swa = Recorder(), SWA(SWAConfig(start=start, every=every, rule=rule))
    fit(dense(), recorder, swa)
    assert len(recorder.after) == 4 * STEPS
    core = core_average(recorder.after, swa.schedule, rule)
    assert swa.n_averaged == core.n_averaged > 1
    close(swa.averaged_weights, core.average)


def test_the_first_snapshot_is_a_bit_exact_copy():
    recorder, swa = Recorder(), SWA({"start": "5step", "every": "99step"})
    fit(dense(), recorder, swa)
    same(swa.averaged_weights, recorder.after[5])


@pytest.mark.parametrize("validate", ["both", "average", "raw"])
@pytest.mark.parametrize("make", [dense, with_batch_norm])
def test_the_training_is_bit_identical_to_one_without(make, validate):
    plain, averaged = make(), make()
    fit(plain, validation_data=(X, Y))
    swa = SWA({"start": "1ep", "every": "1step"}, bn_data=(X, Y), validate=validate, finalize=False)
    fit(averaged, swa, validation_data=(X, Y))
    assert swa.n_averaged == 13
    same(everything(averaged), everything(plain))


def test_model_is_touched_on_snapshots_only():
    class Counted(SWA):
        touched = 0

        @property
        def model(self):
            self.touched += 1
            return super().model

    swa = Counted({"start": "9step", "every": "99step"}, validate="raw", finalize=False)
    seen = []
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(swa.touched)
    )
    fit(dense(), swa, hook)
    # Constant but for the snapshot at the ninth of sixteen updates.
    assert len(set(seen[:8])) == 1
    assert seen[8] > seen[7]
    assert len(set(seen[8:])) == 1


def test_gradient_accumulation_counts_completed_updates():
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    recorder, swa = Recorder(), SWA({"start": "50%", "every": "1step"})
    fit(dense(optimizer), recorder, swa)
    assert swa.schedule == Schedule(4, 1)
    updated = {batch // 2: w for batch, w in recorder.after.items() if batch % 2 == 0}
    core = core_average(updated, swa.schedule, swa.config.rule)
    assert swa.n_averaged == core.n_averaged == 5
    close(swa.averaged_weights, core.average)


def test_gradient_accumulation_across_epochs():
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=3)
    recorder, swa = Recorder(), SWA({"start": "1step", "every": "2step"})
    fit(dense(optimizer), recorder, swa)  # 16 batches: 5 updates
    updated = {batch // 3: w for batch, w in recorder.after.items() if batch % 3 == 0}
    core = core_average(updated, Schedule(1, 2), swa.config.rule)
    assert swa.n_averaged == core.n_averaged == 3
    close(swa.averaged_weights, core.average)


def test_updates_that_loss_scaling_leaves_out_do_not_count():
    inner = keras.optimizers.SGD(0.01)
    # A scale so large that the first steps overflow and only lower it.
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127)
    recorder, swa = Recorder(), SWA({"start": "2step", "every": "1step"}, validate="raw")
    model = dense(optimizer)
    distinct = [weights(model)]
    fit(model, recorder, swa)
    for batch in sorted(recorder.after):
        if any((a != b).any() for a, b in zip(recorder.after[batch], distinct[-1], strict=True)):
            distinct.append(recorder.after[batch])
    updates = dict(enumerate(distinct[1:], start=1))
    assert 2 < len(updates) < 16
    core = core_average(updates, Schedule(2, 1), swa.config.rule)
    assert swa.n_averaged == core.n_averaged
    close(swa.averaged_weights, core.average)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on torch"
)
def test_steps_per_execution():
    model = dense(steps_per_execution=2)
    seen, swa = [], SWA({"start": "2step", "every": "4step"}, validate="raw", finalize=False)
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(swa.n_averaged)
    )
    fit(model, swa, hook)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on torch"
)
def test_steps_per_execution_with_a_shorter_last_execution():
    # Four batches in executions of 3 and 1: the epoch's end is a boundary, though Keras calls its
    # last batch number 5.
    recorder = []
    swa = SWA({"start": "1ep", "every": "1ep"}, validate="raw", finalize=False)
    hook = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: recorder.append(weights(swa.model))
    )
    fit(dense(steps_per_execution=3), swa, hook)
    assert swa.n_averaged == 4
    close(swa.averaged_weights, [np.mean(w, axis=0) for w in zip(*recorder, strict=True)])


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on torch"
)
def test_a_snapshot_inside_an_execution_is_refused():
    model = dense(steps_per_execution=2)
    before = weights(model)
    with pytest.raises(ConfigError, match="update 3 falls inside an execution of 2"):
        fit(model, SWA({"start": "3step", "every": "4step"}))
    same(weights(model), before)


def test_several_fits_go_on_counting():
    recorder = Recorder()
    swa = SWA({"start": "50%", "every": "2step"}, finalize=False)
    model = dense()
    for _ in range(2):
        fit(model, recorder, swa)
    assert swa.schedule == Schedule(8, 2)
    core = core_average(recorder.after, swa.schedule, swa.config.rule)
    assert swa.n_averaged == core.n_averaged == 13
    close(swa.averaged_weights, core.average)


def test_a_longer_second_fit_keeps_the_schedule_of_the_first_and_says_so():
    swa, model = SWA({"start": "50%", "every": "1ep"}, finalize=False), dense()
    fit(model, swa)
    with pytest.warns(SWAWarning, match=r"start=8.*start=12"):
        fit(model, swa, epochs=6, initial_epoch=4)
    assert swa.n_averaged == 3 + 2


def test_initial_epoch_counts_as_epochs_done():
    recorder, swa = Recorder(), SWA({"start": "75%", "every": "1ep"})
    fit(dense(), recorder, swa, epochs=8, initial_epoch=5)
    assert swa.schedule == Schedule(24, 4)
    assert swa.n_averaged == 3
    close(
        swa.averaged_weights,
        [np.mean(w, 0) for w in zip(*[recorder.after[n] for n in (4, 8, 12)], strict=True)],
    )


def test_the_count_starts_at_the_callback_and_not_at_the_optimizers_iterations():
    model = dense()
    fit(model)
    recorder, swa = Recorder(), SWA({"start": "2step", "every": "99step"})
    fit(model, recorder, swa)
    same(swa.averaged_weights, recorder.after[2])


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("validate", ["both", "raw"])
def test_unknown_length_ticks_in_epochs(validate):
    recorder, counts = Recorder(), []
    swa = SWA({"start": "50%", "every": "1ep"}, validate=validate)
    hook = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(swa.n_averaged)
    )
    history = fit(dense(), recorder, swa, hook, data=stream(), validation_data=(X, Y))
    assert counts == [0, 1, 2, 3]
    core = core_average(recorder.after, Schedule(8, 4), swa.config.rule)
    close(swa.averaged_weights, core.average)
    if validate == "both":  # the snapshot of an epoch is seen by its validation
        logs = history.history
        assert logs["val_swa_loss"][:2] == pytest.approx(logs["val_loss"][:2], rel=1e-6)
        assert logs["val_swa_loss"][2] != logs["val_loss"][2]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_unknown_length_with_times_in_steps():
    recorder, swa = Recorder(), SWA({"start": "5step", "every": "3step"})
    fit(dense(), recorder, swa, data=stream())
    core = core_average(recorder.after, Schedule(5, 3), swa.config.rule)
    assert swa.n_averaged == core.n_averaged == 4
    close(swa.averaged_weights, core.average)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"start": "75%", "every": "3step"}, "swa.every: needs a count of updates"),
        ({"start": "1.5ep", "every": "1ep"}, "swa.start: falls within an epoch"),
        ({"start": "30%", "every": "10%"}, "swa.start: falls within an epoch"),
        ({"lr": {"value": 0.1, "anneal": "1ep"}}, "swa.lr.anneal: needs a count of updates"),
    ],
)
def test_unknown_length_with_a_mix_that_cannot_be_resolved(config, message):
    with pytest.raises(ConfigError, match=message):
        fit(dense(), SWA(config), data=stream())


def test_nonfinite_snapshots_are_left_out_and_counted():
    class Poison(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                self.kept = weights(self.model)
                bad = [np.full_like(w, np.nan) for w in self.kept]
                for v, value in zip(self.model.trainable_variables, bad, strict=True):
                    v.assign(value)

        def on_epoch_begin(self, epoch, logs=None):
            if epoch:
                for v, value in zip(self.model.trainable_variables, self.kept, strict=True):
                    v.assign(value)

    model = dense(keras.optimizers.SGD(0.05))
    swa = SWA({"start": "1step", "every": "1step"}, finalize=False)
    fit(model, Poison(), swa)
    assert (swa.n_averaged, swa.n_skipped) == (12, 4)
    assert all(np.isfinite(w).all() for w in swa.averaged_weights)


def test_the_average_shares_no_memory_with_the_weights():
    model, swa = dense(), SWA({"start": "4step", "every": "99step"}, finalize=False)
    fit(model, swa, epochs=1)
    before = swa.averaged_weights
    fit(model, epochs=2)
    for v in model.trainable_variables:
        v.assign(v * 0)
    same(swa.averaged_weights, before)
    swa.finalize(model)
    fit(model, epochs=1)  # jax donates the model's arrays to the next step
    same(swa.averaged_weights, before)
    swa.averaged_weights[0][:] = 5  # what is read is a copy
    same(swa.averaged_weights, before)


def test_mixed_precision_and_pure_half_precision_average_in_float32():
    for policy, dtype in (("mixed_bfloat16", "float32"), ("bfloat16", "bfloat16")):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, dtype=policy), keras.layers.Dense(1)]
        )
        model.compile(keras.optimizers.SGD(0.05), "mse")
        recorder, swa = Recorder(), SWA({"start": "1ep", "every": "1step"}, finalize=False)
        fit(model, recorder, swa)
        assert model.trainable_variables[0].dtype == dtype
        assert [w.dtype for w in swa.averaged_weights] == [np.float32] * 4
        core = core_average(recorder.after, swa.schedule, swa.config.rule)
        close(swa.averaged_weights, core.average)
        swa.finalize()
        assert model.trainable_variables[0].dtype == dtype


def test_shared_layers_are_averaged_once_and_frozen_ones_not_at_all():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    shared, frozen = keras.layers.Dense(4), keras.layers.Dense(4, trainable=False)
    model = keras.Model(inputs, keras.layers.Dense(1)(shared(frozen(shared(inputs)))))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    swa = SWA({"start": "1step", "every": "1step"})
    before = frozen.get_weights()
    fit(model, swa)
    assert len(swa.averaged_weights) == 4
    same(frozen.get_weights(), before)
