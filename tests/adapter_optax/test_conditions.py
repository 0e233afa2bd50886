"""Inside of what decides whether an update is made: the average counts those that are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from swa_optax import n_averaged, n_skipped, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")

INNER = optax.chain(optax.adam(0.1), swa(EVERY))


def test_apply_if_finite_counts_what_was_applied():
    tx = optax.apply_if_finite(INNER, 5)
    grads = bad_at({2, 3, 6}, gradients(8, params_like()))
    params, state, visited = train(tx, grads, params_like())
    assert (n_averaged(state), n_skipped(state)) == (5, 0)
    assert int(optax.tree.get(state, "n_updates")) == 5
    assert_average(state, params, [visited[place] for place in (0, 1, 4, 5, 7)])


def test_when_apply_if_finite_gives_up_the_average_still_leaves_nan_out():
    tx = optax.apply_if_finite(INNER, 1)
    grads = bad_at({2, 3, 4}, gradients(6, params_like()))
    _, state, visited = train(tx, grads, params_like())
    assert np.isnan(visited[-1]["dense"]["bias"]).all()
    assert (n_averaged(state), n_skipped(state)) == (2, 3)
    assert_average(state, visited[-1], visited[:2])


def test_apply_if_finite_around_multi_steps():
    # (The other way round, MultiSteps keeps a NaN in its accumulator for ever.)
    tx = optax.apply_if_finite(optax.MultiSteps(INNER, 2).gradient_transformation(), 3)
    params, state, visited = train(tx, bad_at({2}, gradients(6, params_like())), params_like())
    assert n_averaged(state) == 2
    assert_average(state, params, [visited[place] for place in (1, 4)])


def test_conditionally_mask_counts_what_was_let_through():
    settings = SWAConfig(start="2step", every="1step")
    tx = optax.conditionally_mask(
        optax.chain(optax.adam(0.1), swa(settings)), lambda step: step % 3 == 0
    )
    params, state, visited = trained(tx, 9)
    assert n_averaged(state) == 2
    assert_average(state, params, [visited[3], visited[6]])


def test_conditions_on_extra_arguments():
    tx = optax.conditionally_mask(INNER, lambda step, good, **others: good, forward_extra_args=True)
    for good, n in ((True, 4), (False, 0)):
        params, state, visited = trained(tx, good=jnp.array(good), other=1)
        assert n_averaged(state) == n
        if good:
            assert_average(state, params, visited)


def test_conditionally_transform_averages_what_its_chain_led_to():
    # Elsewhere it passes gradients through untouched: no update of this chain.
    tx = optax.conditionally_transform(
        optax.chain(optax.sgd(0.1), swa(EVERY)), lambda step: step % 2 == 0
    )
    params, state, visited = trained(tx, 6)
    assert n_averaged(state) == 3
    assert_average(state, params, visited[0::2])


def test_swa_alone_under_a_condition_has_a_schedule_of_any_kind():
    def powers(step):
        return (step & (step + 1)) == 0

    tx = optax.chain(optax.adam(0.1), optax.conditionally_transform(swa(EVERY), powers))
    params, state, visited = trained(tx, 9)
    assert n_averaged(state) == 4
    assert_average(state, params, [visited[place] for place in (0, 1, 3, 7)])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_snapshot_under_a_condition_is_at_most_rounded_once_more(where):
    # The compiler computes what stands under a condition apart from what the training goes on
    # with, and may fuse p - lr * m there. In a chain outside of conditions it cannot.
    optimizer, params = optax.adamw(0.1), {"w": jnp.linspace(-1, 1, 2048, dtype=jnp.float32)}
    if where == "inside":
        tx = optax.apply_if_finite(optax.chain(optimizer, swa(EVERY)), 3)
    else:
        tx = optax.chain(optax.apply_if_finite(optimizer, 3), swa(EVERY))
    params, state, _ = train(tx, gradients(1, params), params, jit=jax.jit)
    got, live = optax.tree.get(state, "average")["w"], params["w"]
    step = np.abs(live - jnp.linspace(-1, 1, 2048, dtype=jnp.float32))
    allowed = 0 if where == "outside" else np.spacing(step + np.abs(live))
    assert (np.abs(got - live) <= allowed).all()


def test_a_condition_costs_no_second_compilation_when_it_turns():
    tx, start = optax.apply_if_finite(INNER, 3), params_like()
    grads = [*bad_at({0, 2}, gradients(4, start))]
    train(tx, grads, start)  # asserts one compilation
    init = jax.jit(tx.init)(start)
    assert jax.tree.map(jax.typeof, init) == jax.tree.map(jax.typeof, tx.init(start))
