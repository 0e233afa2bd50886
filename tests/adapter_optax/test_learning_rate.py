"""The learning rate of ``[swa.lr]`` as optax asks for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import ConfigError, SWAConfig, learning_rate
from swa_optax import swa, swa_lr

SHAPES = {
    "constant": {"value": 0.02},
    "cosine": {"value": 0.02, "anneal": "4step"},
    "linear": {"value": 0.2, "anneal": "4step", "shape": "linear"},
    "cyclical": {"value": 0.05, "cycle": "3step", "low": 0.01},
}


def config(**lr):
    return SWAConfig.from_dict({"start": "5step", "every": "3step", "lr": lr})


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_cores_function_asked_with_count_plus_one(shape, x64):
    settings = config(**SHAPES[shape])
    schedule, lr = swa_lr(0.1, settings), settings.lr_schedule()
    expected = [float(learning_rate(count + 1, 0.1, lr)) for count in range(15)]
    jitted, counts = jax.jit(schedule), jnp.arange(15, dtype=jnp.int32)
    for got in (
        [schedule(count) for count in range(15)],
        [jitted(count) for count in counts],
        jax.vmap(schedule)(counts),
        jitted(counts),
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_departs_from_the_rate_that_made_update_start():
    base = optax.exponential_decay(0.1, 1, 0.9)
    schedule = swa_lr(base, config(value=0.02, anneal="4step", shape="linear"))
    before = [0.1 * 0.9**count for count in range(5)]  # updates 1 to 5
    after = [before[-1] + (0.02 - before[-1]) * t for t in (0.25, 0.5, 0.75, 1, 1)]
    np.testing.assert_allclose([schedule(c) for c in range(10)], before + after, rtol=1e-6)


def test_makes_the_updates_that_the_configuration_says():
    tx = optax.chain(optax.sgd(swa_lr(0.1, config(value=0.02))), swa(config(value=0.02)))
    params, seen = {"w": jnp.zeros(())}, []
    state = tx.init(params)
    for _ in range(7):
        updates, state = jax.jit(tx.update)({"w": -jnp.ones(())}, state, params)
        seen.append(float(updates["w"]))
    np.testing.assert_allclose(seen, [0.1] * 5 + [0.02] * 2, rtol=1e-6)


def test_under_inject_hyperparams():
    schedule = swa_lr(0.1, config(value=0.02))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    params, seen = {"w": jnp.zeros(())}, []
    state = tx.init(params)
    for _ in range(7):
        _, state = jax.jit(tx.update)({"w": -jnp.ones(())}, state, params)
        seen.append(float(state.hyperparams["learning_rate"]))
    np.testing.assert_allclose(seen, [0.1] * 5 + [0.02] * 2, rtol=1e-6)


def test_without_a_rate_in_the_configuration_it_is_the_base():
    settings = SWAConfig(start="5step", every="3step")
    base = optax.linear_schedule(0.1, 0.0, 10)
    assert swa_lr(base, settings) is base
    assert swa_lr(0.1, settings)(7) == 0.1


def test_times_in_epochs_and_shares():
    settings = SWAConfig.from_dict({"start": "50%", "every": "1ep", "lr": {"value": 0.02}})
    schedule = swa_lr(0.1, settings, steps_per_epoch=3, total_steps=12)
    np.testing.assert_allclose([schedule(c) for c in (5, 6)], [0.1, 0.02], rtol=1e-6)
    with pytest.raises(ConfigError, match="steps_per_epoch is needed"):
        swa_lr(0.1, settings, total_steps=12)


def test_the_count_stays_at_its_end():
    assert float(swa_lr(0.1, config(value=0.02))(jnp.int32(2**31 - 1))) == np.float32(0.02)
