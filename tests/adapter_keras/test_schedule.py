"""SWASchedule: the rate of ``[swa.lr]`` in the compiled step, equal to the core's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import Recorder, array, dense, fit, same, weights

from swa_core import ConfigError, LearningRate, SWAConfig, SWAError, learning_rate
from swa_keras import SWA, SWAOptimizer, SWASchedule

LENGTHS = {"steps_per_epoch": 4, "total_steps": 16}
LRS = [
    LearningRate(value=0.01),
    LearningRate(value=0.01, anneal="1ep", shape="linear"),
    LearningRate(value=0.01, anneal="5step"),
    LearningRate(value=0.02, cycle="2step", low=0.005),
]
ANNEALED = SWAConfig(start="2ep", every="1ep", lr=LRS[2])


def decay():
    return keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9)


def core_rates(config, base, *, batches=1, number=16):
    """The rates of the updates by the core; ``base`` is asked with what Keras counts."""
    lr = config.lr_schedule(**LENGTHS)
    rates = []
    for update in range(1, number + 1):
        before = (
            base if isinstance(base, float) else float(base(batches * min(update, lr.start) - 1))
        )
        rates.append(float(learning_rate(update, before, lr)))
    return rates


class RateOfStep(keras.optimizers.Optimizer):
    """Moves every weight by the rate, so that the weights tell it."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, keras.ops.zeros(variable.shape) + learning_rate)


def made_with(optimizer, **compile_with):
    """The rate that made each update of a training, as the weights tell it."""
    recorder, model = Recorder(), dense(optimizer, **compile_with)
    first = weights(model)[1][0]  # a bias, 0 at first
    fit(model, recorder)
    values = [first, *(after[1][0] for _, after in sorted(recorder.after.items()))]
    return -np.diff(np.array(values, np.float64))


@pytest.mark.parametrize("base", [0.05, "decay"])
@pytest.mark.parametrize("lr", LRS, ids=["constant", "linear", "cosine", "cycle"])
def test_the_rate_is_the_cores_at_every_update(lr, base):
    base = decay() if base == "decay" else base
    config = SWAConfig(start="2ep", every="1ep", lr=lr)
    rate = SWASchedule(base, config, **LENGTHS)
    for step in (5, np.int64(5), keras.ops.convert_to_tensor(5)):
        assert float(rate(step)) == float(rate(5))
    found = [float(array(rate(keras.ops.convert_to_tensor(step)))) for step in range(16)]
    np.testing.assert_allclose(found, core_rates(config, _at(base)), rtol=1e-6)


def _at(base):
    return base if isinstance(base, float) else lambda step: array(base(step))


@pytest.mark.parametrize("lr", [LRS[2], LRS[3]], ids=["cosine", "cycle"])
def test_every_update_of_fit_is_made_at_it(lr):
    config = SWAConfig(start="2ep", every="1ep", lr=lr)
    found = made_with(RateOfStep(SWASchedule(decay(), config, **LENGTHS)))
    np.testing.assert_allclose(found, core_rates(config, _at(decay())), rtol=2e-4)


def test_with_gradient_accumulation_it_counts_updates():
    config = SWAConfig(start="3step", every="1step", lr=LearningRate(value=0.01, anneal="2step"))
    rate = SWASchedule(decay(), config, gradient_accumulation_steps=2)
    found = made_with(RateOfStep(rate, gradient_accumulation_steps=2))
    np.testing.assert_array_equal(found[::2], 0)
    expected = core_rates(config, _at(decay()), batches=2, number=8)
    np.testing.assert_allclose(found[1::2], expected, rtol=2e-4)


def test_under_steps_per_execution_and_loss_scaling():
    config = SWAConfig(start="3step", every="1step", lr=LearningRate(value=0.01, anneal="2step"))
    inner = RateOfStep(SWASchedule(0.05, config))
    if keras.backend.backend() == "torch":
        model = dense(inner)  # torch runs one step at a time
    else:
        model = dense(inner, steps_per_execution=2)
    before = weights(model)[1][0]
    fit(model)
    total = sum(core_rates(config, 0.05))
    np.testing.assert_allclose(before - weights(model)[1][0], total, rtol=1e-5)
    inner = RateOfStep(SWASchedule(0.05, config))
    # The first steps overflow, and are left out.
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127)
    found = made_with(optimizer)
    made = found[found != 0]
    assert 0 < len(made) < 16
    np.testing.assert_allclose(made, core_rates(config, 0.05)[: len(made)], rtol=2e-4)


def test_far_into_a_training_it_still_counts_exactly():
    start = 3 * 2**24 + 1  # beyond float32's whole numbers
    lr = LearningRate(value=0.02, cycle="4step", low=0.005)
    rate = SWASchedule(0.05, SWAConfig(start=f"{start}step", every="4step", lr=lr))
    updates = range(start - 1, start + 9)
    found = [float(array(rate(keras.ops.convert_to_tensor(u - 1)))) for u in updates]
    expected = [float(learning_rate(u, 0.05, rate.lr)) for u in updates]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_it_is_traced_once():
    config = SWAConfig(start="3step", every="1step", lr=LearningRate(value=0.01, anneal="2step"))
    asked = []

    class Asked(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            asked.append(step)
            return 0.05

        def get_config(self):
            return {}

    fit(dense(keras.optimizers.SGD(SWASchedule(Asked(), config))), epochs=1)
    once = len(asked)
    fit(dense(keras.optimizers.SGD(SWASchedule(Asked(), config))), epochs=4)
    eager = keras.backend.backend() == "torch"
    assert len(asked) - once == (4 * once if eager else once)


def test_without_lr_it_is_the_base():
    rate, base = SWASchedule(decay(), {}, **LENGTHS), decay()
    assert rate.lr is None
    assert [float(rate(s)) for s in range(16)] == [float(base(s)) for s in range(16)]
    assert float(SWASchedule(1, {}, **LENGTHS)(3)) == 1.0


@pytest.mark.parametrize("base", [0.05, "decay"])
def test_it_is_saved_with_the_model(base, tmp_path):
    base = decay() if base == "decay" else base
    rate = SWASchedule(base, ANNEALED, **LENGTHS)
    again = SWASchedule.from_config(rate.get_config())
    assert again.get_config() == rate.get_config()
    assert (again.lr, again.config) == (rate.lr, rate.config)
    whole, model = dense(keras.optimizers.SGD(rate)), dense(keras.optimizers.SGD(rate))
    fit(whole, shuffle=False)
    fit(model, shuffle=False, epochs=2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer._learning_rate.get_config() == rate.get_config()
    fit(again, shuffle=False, epochs=2)
    same(weights(again), weights(whole))


# With the callback and the optimizer wrapper


def test_the_callback_takes_it_and_sets_nothing():
    found = {}
    for name, callbacks in {"plain": [], "averaged": [SWA(ANNEALED, finalize=False)]}.items():
        model = dense(keras.optimizers.SGD(SWASchedule(decay(), ANNEALED, **LENGTHS)))
        fit(model, *callbacks)
        found[name] = weights(model)
    same(found["averaged"], found["plain"])


def test_the_callback_takes_it_under_steps_per_execution():
    if keras.backend.backend() == "torch":
        pytest.skip("torch runs one step at a time")
    model = dense(
        keras.optimizers.SGD(SWASchedule(0.05, ANNEALED, **LENGTHS)), steps_per_execution=2
    )
    swa = SWA(ANNEALED)
    fit(model, swa)
    assert swa.n_averaged == 3


def test_the_callback_refuses_one_of_another_rate():
    def refused(rate, match, optimizer=keras.optimizers.SGD, **arguments):
        with pytest.raises(SWAError, match=match):
            fit(dense(optimizer(rate)), SWA(ANNEALED), **arguments)

    other = SWAConfig(start="1ep", every="1ep", lr=LearningRate(value=0.02, anneal="5step"))
    refused(
        SWASchedule(0.05, other, **LENGTHS),
        "start is 4 there and 8 here, value is 0.02 there and 0.01 here",
    )
    refused(SWASchedule(0.05, {}, **LENGTHS), r"without \[swa.lr\]")
    rate = SWASchedule(0.05, ANNEALED, steps_per_epoch=2, total_steps=8)
    refused(
        rate,
        "gradient_accumulation_steps=2",
        lambda r: keras.optimizers.SGD(r, gradient_accumulation_steps=2),
    )
    refused(decay(), r"ExponentialDecay, which cannot be set(.|\n)*learning_rate=swa_keras.SWASch")


def test_the_optimizer_wrapper_asks_for_it():
    with pytest.raises(SWAError, match=r"Hint: give that optimizer learning_rate=swa_keras.SWASch"):
        SWAOptimizer("sgd", ANNEALED, **LENGTHS)
    other = SWASchedule(0.05, ANNEALED, steps_per_epoch=5)
    with pytest.raises(SWAError, match="start is 10 there and 8 here"):
        SWAOptimizer(keras.optimizers.SGD(other), ANNEALED, **LENGTHS)
    rate = SWASchedule(decay(), ANNEALED, **LENGTHS)
    optimizer = SWAOptimizer(RateOfStep(rate), ANNEALED, **LENGTHS)
    np.testing.assert_allclose(made_with(optimizer), core_rates(ANNEALED, _at(decay())), rtol=2e-4)
    assert optimizer.n_averaged == 3


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"a float, or a .*LearningRateSchedule, got 'fast'"):
        SWASchedule("fast", ANNEALED, **LENGTHS)
    with pytest.raises(ConfigError, match="steps_per_epoch is needed"):
        SWASchedule(0.05, ANNEALED)
    for steps in (0, 1.5, "2"):
        with pytest.raises(ConfigError, match="gradient_accumulation_steps: expected a whole"):
            SWASchedule(0.05, ANNEALED, **LENGTHS, gradient_accumulation_steps=steps)
