"""Gradient accumulation: the average counts the updates that are made, not the micro-steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from adapter_optax.training import (
    EVERY,
    assert_average,
    bad_at,
    gradients,
    params_like,
    train,
    trained,
)

from swa_core import SWAConfig
from swa_optax import averaged_params, n_averaged, n_skipped, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # MultiSteps multiplies an int by a bool

INNER = optax.chain(optax.sgd(0.1), swa(EVERY))


def test_counts_updates():
    tx = optax.MultiSteps(optax.chain(optax.adam(0.1), swa(EVERY)), 4)
    params, state, visited = trained(tx, 12)
    assert n_averaged(state) == 3
    assert int(optax.tree.get(state, "n_updates")) == int(state.gradient_step) == 3
    assert_average(state, params, visited[3::4])


def test_a_schedule_in_updates_and_a_sum_of_gradients():
    settings = SWAConfig(start="2step", every="2step")
    tx = optax.MultiSteps(
        optax.chain(optax.sgd(0.1), swa(settings)), 3, use_grad_mean=False
    ).gradient_transformation()
    params, state, visited = trained(tx, 13)  # and one micro-step of the next update
    assert n_averaged(state) == 2
    assert_average(state, params, [visited[5], visited[11]])


def test_a_growing_number_of_micro_steps():
    # Updates 1 and 2 are of one micro-step each, the later ones of three.
    tx = optax.MultiSteps(INNER, lambda update: jnp.where(update < 2, 1, 3))
    params, state, visited = trained(tx, 8)
    assert n_averaged(state) == 4
    assert_average(state, params, [visited[place] for place in (0, 1, 4, 7)])


def test_skipped_micro_steps_never_were():
    tx = optax.MultiSteps(INNER, 2, should_skip_update_fn=optax.skip_not_finite)
    grads = bad_at({0, 3, 4}, gradients(9, params_like()))
    params, state, visited = train(tx, grads, params_like())
    assert (n_averaged(state), n_skipped(state)) == (3, 0)
    assert_average(state, params, [visited[place] for place in (2, 6, 8)])


def test_large_updates_are_skipped():
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=100.0)
    tx = optax.MultiSteps(INNER, 1, should_skip_update_fn=skip)
    grads = list(gradients(5, params_like()))
    grads[2] = jax.tree.map(lambda leaf: 100 * leaf, grads[2])
    params, state, visited = train(tx, grads, params_like())
    assert_average(state, params, [visited[place] for place in (0, 1, 3, 4)])


def test_nan_that_is_not_skipped_before_is_left_out_of_the_average():
    tx = optax.MultiSteps(optax.chain(optax.zero_nans(), INNER), 2)
    params, state, visited = train(tx, bad_at({1}, gradients(6, params_like())), params_like())
    assert n_averaged(state) == 3
    tx = optax.MultiSteps(INNER, 2)
    params, state, visited = train(tx, bad_at({3}, gradients(6, params_like())), params_like())
    assert (n_averaged(state), n_skipped(state)) == (1, 2)
    assert_average(state, params, [visited[1]])


def test_accumulating_within_accumulation():
    tx = optax.MultiSteps(optax.MultiSteps(INNER, 2).gradient_transformation(), 3)
    params, state, visited = trained(tx, 12)
    assert n_averaged(state) == 2
    assert_average(state, params, visited[5::6])


def test_around_optimizers_that_need_parameters():
    for inner in (
        optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
        optax.contrib.mechanize(optax.sgd(0.1)),
    ):
        tx = optax.MultiSteps(optax.chain(inner, swa(EVERY)), 2)
        params, state, visited = trained(tx)
        assert_average(state, params, visited[1::2])


def test_half_precision_parameters():
    # MultiSteps gives the inner states back in the dtypes they had.
    tx = optax.MultiSteps(INNER, 2)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_like())
    params, state, visited = train(tx, gradients(4, start), start)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "average"))}
    assert dtypes == {jnp.dtype("float32")}
    got = averaged_params(state, params)
    expected = jax.tree.map(
        lambda a, b: ((a.astype("f4") + b.astype("f4")) / 2).astype(jnp.bfloat16),
        visited[1],
        visited[3],
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, expected))
