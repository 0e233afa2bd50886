"""SWAOptimizer: the core's average of the scheduled updates, inside a training left as it is."""

from __future__ import annotations

from contextlib import nullcontext

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    Recorder,
    X,
    Y,
    array,
    close,
    compiled,
    dense,
    fit,
    same,
    weights,
    with_batch_norm,
)

import swa_core
from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_keras import SWAOptimizer

EVERY = SWAConfig(start="1step", every="1step", rule=EMA(0.9))


def sgd(**arguments):
    return keras.optimizers.SGD(0.05, momentum=0.9, **arguments)


def core_average(recorded, schedule, rule):
    """The core's state after updates that led to these weights."""
    state = swa_core.init(recorded[0])
    for after in recorded:
        state = swa_core.update(state, after, schedule, rule)
    return state


def agrees(optimizer, recorded):
    core = core_average(recorded, optimizer.schedule, optimizer.config.rule)
    counts = optimizer.updates, optimizer.n_averaged, optimizer.n_skipped
    assert counts == (core.updates, core.n_averaged, core.n_skipped)
    assert optimizer.average.total == pytest.approx(core.total, rel=1e-12)
    close(optimizer.averaged_weights, core.average)
    return core


def trained_beside(inner, config=EVERY, make=dense, rtol=0.0, **arguments):
    """An averaged training whose weights are, at every update, those of the one without."""
    runs = []
    for optimizer in (inner(), SWAOptimizer(inner(), config)):
        recorder, model = Recorder(), make(optimizer)
        fit(model, recorder, **arguments)
        runs.append((recorder.after, model))
    (plain, _), (averaged, model) = runs
    assert plain.keys() == averaged.keys()
    for update in plain:
        same(averaged[update], plain[update])
    return model, list(averaged.values())


@pytest.mark.parametrize(
    "config",
    [
        EVERY,
        SWAConfig(start="7step", every="3step", rule=Uniform()),
        SWAConfig(start="2step", every="2step", stop="11step", rule=Polynomial(eta=1)),
    ],
    ids=["ema", "uniform", "polynomial"],
)
def test_the_average_is_the_cores_and_the_training_stays_what_it_was(config):
    model, recorded = trained_beside(sgd, config)
    core = agrees(model.optimizer, recorded)
    assert core.n_averaged == config.schedule().n_snapshots(16)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.Adam(0.01, weight_decay=0.1, clipnorm=0.5, amsgrad=True),
        lambda: keras.optimizers.RMSprop(0.01, global_clipnorm=0.5),
        lambda: keras.optimizers.Muon(0.01),
        lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
    ],
    ids=["adam", "rmsprop", "muon", "schedule-free"],
)
def test_every_optimizer_trains_as_it_does_alone(inner):
    model, recorded = trained_beside(inner, epochs=1)
    agrees(model.optimizer, recorded)


def test_with_batch_norm_and_dropout_too():
    model, recorded = trained_beside(sgd, make=with_batch_norm)
    agrees(model.optimizer, recorded)


def test_run_eagerly_and_steps_per_execution():
    optimizer = SWAOptimizer(sgd(), EVERY)
    recorder = Recorder()
    fit(dense(optimizer, run_eagerly=True), recorder)
    agrees(optimizer, list(recorder.after.values()))
    if keras.backend.backend() == "torch":
        return  # which runs one step at a time
    several = SWAOptimizer(sgd(), SWAConfig(start="3step", every="1step"))
    fit(dense(several, steps_per_execution=4))
    assert (several.updates, several.n_averaged) == (16, 14)


def test_the_first_snapshot_is_a_bit_exact_copy():
    optimizer, recorder = SWAOptimizer(sgd(), {"start": "5step", "every": "99step"}), Recorder()
    fit(dense(optimizer), recorder)
    same(optimizer.averaged_weights, recorder.after[5])


@pytest.mark.parametrize("steps", [2, 3])
def test_gradient_accumulation_counts_completed_updates(steps):
    config = SWAConfig(start="2step", every="1step", rule=EMA(0.9))
    model, recorded = trained_beside(lambda: sgd(gradient_accumulation_steps=steps), config)
    core = agrees(model.optimizer, recorded[steps - 1 :: steps])
    assert core.updates == 16 // steps


def test_an_inner_optimizer_that_has_trained_before_is_counted_from_now():
    inner = sgd(gradient_accumulation_steps=3)
    model = dense(inner)
    fit(model, epochs=1)  # 4 batches: one update, and one batch of the next
    optimizer, recorder = SWAOptimizer(inner, EVERY), Recorder()
    compiled(model, optimizer)
    fit(model, recorder, epochs=2)  # updates at batches 2, 5 and 8
    assert optimizer.updates == 3
    agrees(optimizer, [recorder.after[batch] for batch in (2, 5, 8)])


def test_updates_that_loss_scaling_leaves_out_do_not_count():
    runs = []
    for make in (lambda: sgd(), lambda: SWAOptimizer(sgd(), EVERY)):
        inner = make()
        # A scale so large that the first steps overflow, and only lower it.
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127)
        recorder, model = Recorder(), dense(optimizer)
        before = weights(model)
        fit(model, recorder)
        runs.append((before, list(recorder.after.values()), inner))
    (_, plain, _), (before, averaged, optimizer) = runs
    for a, b in zip(averaged, plain, strict=True):
        same(a, b)
    made = changing(before, averaged)
    assert 0 < len(made) < 16
    agrees(optimizer, made)


def changing(before, recorded):
    """The weights after batches that changed them."""
    return [
        after
        for last, after in zip([before, *recorded], recorded, strict=False)
        if any((a != b).any() for a, b in zip(last, after, strict=True))
    ]


def test_mixed_float16_wraps_it_in_a_loss_scaling_optimizer():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    model.dtype_policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    optimizer, recorder = SWAOptimizer(sgd(loss_scale_factor=8.0), EVERY), Recorder()
    compiled(model, optimizer)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert optimizer.inner_optimizer.loss_scale_factor is None  # else gradients are scaled twice
    before = weights(model)
    fit(model, recorder, epochs=1)
    made = changing(before, list(recorder.after.values()))
    assert made
    agrees(optimizer, made)
    with optimizer.averaged(model):
        same(weights(model), optimizer.averaged_weights)


def test_a_loss_scale_factor_of_the_inner_optimizer_is_applied():
    model, recorded = trained_beside(lambda: sgd(loss_scale_factor=8.0))
    agrees(model.optimizer, recorded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_average_in_float32(dtype):
    policy = keras.dtype_policies.DTypePolicy(dtype)
    model = keras.Sequential([keras.Input((4,), dtype=dtype), keras.layers.Dense(1, dtype=policy)])
    optimizer, recorder = SWAOptimizer(keras.optimizers.SGD(0.01), EVERY), Recorder()
    compiled(model, optimizer, auto_scale_loss=False)
    fit(model, recorder, epochs=1)
    recorded = [
        [np.asarray(value, np.float32) for value in after] for after in recorder.after.values()
    ]
    core = core_average(recorded, optimizer.schedule, optimizer.config.rule)
    assert {leaf.dtype for leaf in optimizer.averaged_weights} == {np.dtype("float32")}
    close(optimizer.averaged_weights, core.average)
    optimizer.finalize(model)
    assert model.trainable_variables[0].dtype == dtype


def test_frozen_weights_have_no_average():
    optimizer = SWAOptimizer(sgd(), EVERY)
    model = dense()
    model.layers[0].trainable = False
    compiled(model, optimizer)
    frozen = array(model.layers[0].kernel)
    fit(model)
    assert [v.shape for v in optimizer.average.averages] == [(5, 1), (1,)]
    optimizer.finalize(model)
    np.testing.assert_array_equal(array(model.layers[0].kernel), frozen)


def test_variables_that_a_gradient_overwrites_have_no_average():
    class Scaled(keras.layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.scale = self.add_weight(shape=(1,), initializer="ones", name="scale")
            self.scale.overwrite_with_gradient = True

    model = keras.Sequential([keras.Input((4,)), Scaled(2)])
    scale = model.layers[0].scale
    optimizer = SWAOptimizer(keras.optimizers.SGD(1.0), EVERY)
    variables = model.trainable_variables
    optimizer.build(variables)
    grads = [keras.ops.ones(v.shape) for v in variables]
    if keras.backend.backend() == "jax":
        stateless(optimizer, variables, grads)
    else:
        optimizer.apply(grads, variables)
    assert [v.path for v in optimizer.average.variables] == [
        v.path for v in variables if v is not scale
    ]
    with optimizer.averaged(model):
        assert len(optimizer.averaged_weights) == 2


def stateless(optimizer, variables, grads):
    """One step as jax' trainer makes it."""
    own = optimizer.variables
    new, new_own = optimizer.stateless_apply(
        [v.value for v in own], grads, [v.value for v in variables]
    )
    for variable, value in zip([*variables, *own], [*new, *new_own], strict=True):
        variable.assign(value)


def test_several_optimizers_by_variable():
    def inner():
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.05), {".*bias": keras.optimizers.Adam(0.01)}
            )
        )

    model, recorded = trained_beside(inner)
    agrees(model.optimizer, recorded)


def test_nonfinite_snapshots_are_left_out_unless_asked_for():
    def step(optimizer, variables, value):
        grads = [keras.ops.zeros(v.shape) + value for v in variables]
        optimizer.apply(grads, variables)

    for nonfinite, expected in (("skip", (2, 1)), ("keep", (3, 0))):
        model = dense()
        variables = model.trainable_variables
        optimizer = SWAOptimizer(
            keras.optimizers.SGD(1.0), SWAConfig(start="1step", every="1step", nonfinite=nonfinite)
        )
        step(optimizer, variables, 1.0)
        before = weights(model)
        step(optimizer, variables, np.inf)
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        step(optimizer, variables, 0.0)
        assert (optimizer.n_averaged, optimizer.n_skipped, optimizer.updates) == (*expected, 3)
        if nonfinite == "skip":
            close(optimizer.averaged_weights, before)
        else:
            assert np.isnan(optimizer.averaged_weights[0]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_one_bad_element_of_a_large_weight_is_found(bad):
    # XLA's maximum loses NaN in arrays of 4096 elements and more, on the CPU.
    variable = keras.Variable(np.ones((70, 90), np.float32))
    optimizer = SWAOptimizer(keras.optimizers.SGD(1.0), SWAConfig(start="1step", every="1step"))
    optimizer.build([variable])
    value = np.ones((70, 90), np.float32)
    value[3, 5] = bad
    for weight, skipped in ((value, 1), (np.full_like(value, 3e38), 1)):
        variable.assign(weight)
        optimizer.apply([keras.ops.zeros((70, 90))], [variable])
        assert optimizer.n_skipped == skipped
    same([optimizer.averaged_weights[0]], [np.full_like(value, 3e38)])


def test_nonfinite_snapshots_are_left_out_of_a_compiled_step():
    x = X.copy()
    x[12] = np.inf  # the third batch
    optimizer = SWAOptimizer(keras.optimizers.SGD(0.0, weight_decay=None), EVERY)
    fit(dense(optimizer), epochs=1, shuffle=False)
    assert optimizer.n_skipped == 0
    optimizer = SWAOptimizer(keras.optimizers.SGD(0.05), EVERY)
    model = dense(optimizer)
    model.fit(x, Y, batch_size=6, shuffle=False, verbose=0)
    # The weights are NaN from the third update on.
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (4, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in optimizer.averaged_weights)


def test_the_step_is_traced_once():
    traced = []

    class Traced(keras.optimizers.SGD):
        def apply(self, *arguments):
            traced.append(1)
            return super().apply(*arguments)

    optimizer = SWAOptimizer(Traced(0.05), SWAConfig(start="3step", every="2step"))
    model = dense(optimizer)
    fit(model, epochs=1)
    once = len(traced)
    fit(model, epochs=3)
    assert optimizer.n_averaged == 7
    if keras.backend.backend() != "torch":
        assert len(traced) == once


def test_what_is_not_a_snapshot_touches_no_average():
    """On jax and tensorflow the compiled step says so; torch returns before it."""
    optimizer = SWAOptimizer(sgd(), SWAConfig(start="99step", every="1step"))
    model = dense(optimizer)
    fit(model, epochs=1)
    assert optimizer.n_averaged == 0
    for average in optimizer.average.averages:
        np.testing.assert_array_equal(array(average), 0.0)


def test_apply_gradients_and_apply_on_some_variables():
    model = dense()
    optimizer = SWAOptimizer(keras.optimizers.SGD(1.0), {"start": "1step", "every": "1step"})
    variables = model.trainable_variables
    optimizer.build(variables)
    start = weights(model)
    ones = [keras.ops.ones(v.shape) for v in variables]
    optimizer.apply_gradients(zip(ones, variables, strict=True))
    optimizer.apply(ones[:1], variables[:1])
    assert (optimizer.updates, optimizer.n_averaged) == (2, 2)
    close(optimizer.averaged_weights, [start[0] - 1.5, *(value - 1 for value in start[1:])])
    optimizer.apply([], [])  # which does nothing at all
    assert optimizer.updates == 2


def test_what_is_asked_of_the_optimizer_is_asked_of_the_inner_one():
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.1)
    optimizer = SWAOptimizer(inner, EVERY, name="averaging")
    model = dense()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(model.trainable_variables)
    assert not inner._use_weight_decay(model.layers[0].bias)
    assert optimizer.name == "averaging"
    optimizer.learning_rate = 0.25
    assert float(array(inner.learning_rate)) == float(array(optimizer.learning_rate)) == 0.25
    optimizer.apply([keras.ops.ones(v.shape) for v in model.trainable_variables])
    assert int(array(optimizer.iterations)) == int(array(inner.iterations)) == 1
    own = [v for v in optimizer.variables if not any(v is w for w in inner.variables)]
    assert len(own) == 2 + 3 + 4  # what every Keras optimizer has, counters, averages
    values = [array(v) for v in optimizer.variables]
    other = SWAOptimizer(keras.optimizers.AdamW(0.3), EVERY)
    other.build(dense().trainable_variables)
    other.set_weights(values)
    same([array(v) for v in other.variables], values)
    same(other.averaged_weights, optimizer.averaged_weights)


# Using the average


def test_the_average_is_lent_and_the_training_goes_on():
    plain, model = with_batch_norm(sgd()), with_batch_norm(SWAOptimizer(sgd(), EVERY))
    fit(plain, epochs=1)
    fit(model, epochs=1)
    optimizer = model.optimizer
    for error in (None, ValueError, KeyboardInterrupt):
        raising = pytest.raises(error) if error else nullcontext()
        with raising, optimizer.averaged(model, bn_data=(X, Y)) as inside:
            assert inside is model
            same(weights(model), optimizer.averaged_weights)
            model.predict(X, verbose=0)
            model.evaluate(X, Y, verbose=0)
            if error:
                raise error
    for run in (plain, model):
        fit(run, epochs=1)
    same(weights(model), weights(plain))
    with optimizer.averaged(model, bn_data=(X, Y)):
        predicted = model.predict(X, verbose=0)
    optimizer.finalize(model, bn_data=(X, Y))
    same(weights(model), optimizer.averaged_weights)
    np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)


def test_during_fit_it_is_read_through_the_callbacks_model():
    optimizer = SWAOptimizer(sgd(), EVERY)
    seen = []

    class Reading(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ours = self.model.optimizer
            with ours.averaged(self.model):
                same(weights(self.model), ours.averaged_weights)
            seen.append((ours.updates, ours.n_averaged))

    plain, model = dense(sgd()), dense(optimizer)
    fit(plain)
    fit(model, Reading())
    assert seen == [(n, n) for n in range(1, 17)]
    same(weights(model), weights(plain))
