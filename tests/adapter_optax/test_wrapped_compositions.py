"""``wrap`` around optax' wrappers, and inside of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from adapter_optax.training import (
    EVERY,
    assert_average,
    bad_at,
    gradients,
    params_like,
    quick_jit,
    same_bits,
    train,
    trained,
)
from optax import contrib

from swa_core import StateError, SWAState
from swa_optax import accumulate, averaged_params, init, n_averaged, swa, wrap

pytestmark = pytest.mark.usefixtures("relaxed_jax")

KERNEL = {"dense": {"kernel": True, "bias": False}}
LABELS = {"dense": {"kernel": "a", "bias": "b"}}

AROUND = {
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "partition": lambda: optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, LABELS),
    "masked": lambda: optax.masked(optax.sgd(0.1), KERNEL),
    "selective": lambda: optax.selective_transform(optax.sgd(0.1), freeze_mask=KERNEL),
    "conditions": lambda: optax.conditionally_transform(optax.sgd(0.1), lambda step: step > 1),
}


@pytest.mark.parametrize("case", AROUND)
def test_around(case):
    inner = AROUND[case]()
    params, state, visited = trained(wrap(inner, EVERY), 3)
    assert n_averaged(state) == 3
    assert_average(state, params, visited)
    assert type(state) is tuple
    assert isinstance(state[1], SWAState)


def test_around_lookahead():
    start = optax.LookaheadParams.init_synced(params_like())
    tx = wrap(optax.lookahead(optax.sgd(0.1), 2, 0.5), EVERY)
    params, state, visited = train(tx, gradients(4, params_like()), start)
    assert_average(state, params, visited)


INSIDE = {
    "masked": lambda tx: optax.masked(tx, KERNEL),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, LABELS),
    "flatten": optax.flatten,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named chain": lambda tx: optax.named_chain(("z", optax.clip(1.0)), ("a", tx)),
}


@pytest.mark.parametrize("case", INSIDE)
def test_inside(case):
    params, state, visited = trained(INSIDE[case](wrap(optax.adam(0.1), EVERY)), 3)
    if case in ("masked", "partition"):
        kept = params["dense"]["bias"]
        assert averaged_params(state, params)["dense"]["bias"] is kept
        visited = [{"dense": v["dense"] | {"bias": kept}} for v in visited]
    assert_average(state, params, visited)


def test_under_injected_hyperparameters():
    @optax.inject_hyperparams
    def make(learning_rate):
        return wrap(optax.MultiSteps(optax.sgd(learning_rate), 2), EVERY)

    params, state, visited = trained(make(learning_rate=0.1))
    assert_average(state, params, visited[1::2])


def test_under_conditions_of_others_it_counts_what_they_let_through():
    tx = optax.apply_if_finite(optax.MultiSteps(wrap(optax.sgd(0.1), EVERY), 2), 3)
    params, state, visited = train(tx, bad_at({1}, gradients(7, params_like())), params_like())
    assert n_averaged(state) == 3
    assert_average(state, params, [visited[place] for place in (2, 4, 6)])


def test_what_its_docstring_says_it_cannot_know():
    for inner in (
        optax.chain(optax.sgd(0.1), optax.apply_every(2)),
        optax.conditionally_mask(optax.sgd(0.1), lambda step: step % 2 == 1),
    ):
        params, state, visited = trained(wrap(inner, EVERY))
        assert n_averaged(state) == 4
        assert_average(state, params, visited)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: contrib.schedule_free(tx, learning_rate=0.1),
        contrib.mechanize,
        lambda tx: optax.lookahead(tx, 2, 0.5),
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.named_chain(("a", tx), ("z", optax.scale(0.5))),
    ],
)
def test_its_average_is_refused_where_its_updates_are_changed(outer):
    tx = outer(wrap(optax.sgd(0.1), EVERY))
    with pytest.raises(StateError, match="not one of weights that the training had"):
        averaged_params(tx.init(params_like()), params_like())


def test_bit_for_bit_the_weights_where_a_condition_stands_around_the_optimizer():
    # Unlike a chain inside of the condition: see test_conditions.
    tx = wrap(optax.apply_if_finite(optax.adamw(0.1), 3), EVERY)
    start = {"w": jnp.linspace(-1, 1, 2048, dtype=jnp.float32)}
    params, state, _ = train(tx, gradients(1, start), start, jit=jax.jit)
    same_bits(state[1].average, params)


def test_weights_that_the_loop_changes_itself_are_for_accumulate():
    # What comes after apply_updates (a projection, here) no transformation sees.
    tx, start = wrap(optax.sgd(1.0), EVERY), {"w": jnp.zeros(2)}

    @quick_jit
    def step(params, state):
        updates, state = tx.update({"w": jnp.array([-1.0, 3.0])}, state, params)
        params = optax.apply_updates(params, updates)
        return optax.projections.projection_non_negative(params), state

    params, state, own, visited = start, tx.init(start), init(start), []
    for _ in range(3):
        params, state = step(params, state)
        own = accumulate(own, params)
        visited.append(params)
    assert_average(own, params, visited)
    assert averaged_params(own, params)["w"].tolist() == [2, 0]
    assert averaged_params(state, params)["w"].tolist() == [2, -3]


def test_it_takes_what_swa_takes():
    # The same state, so that either goes on from the other's.
    chained, wrapped = optax.chain(optax.adam(0.1), swa(EVERY)), wrap(optax.adam(0.1), EVERY)
    params, state, _ = trained(chained, 2)
    grads = next(gradients(1, params, seed=5))
    same_bits(
        quick_jit(chained.update)(grads, state, params),
        quick_jit(wrapped.update)(grads, state, params),
    )
