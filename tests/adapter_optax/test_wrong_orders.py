"""Orders that average something else than the weights: refused where the state tells of them.

A transformation cannot see what is done with its updates afterwards. The training is the same in
any order; what is wrong is the average, so reading it is where it fails.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from adapter_optax.training import (
    EVERY,
    assert_average,
    assert_close,
    bad_at,
    gradients,
    mean,
    params_like,
    quick_jit,
    trained,
)

from swa_core import StateError, StructureError
from swa_optax import averaged_params, finalize, n_averaged, n_skipped, state_to_dict, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")

INNER = optax.chain(optax.sgd(0.1), swa(EVERY))
READERS = {
    "averaged_params": averaged_params,
    "finalize": finalize,
    "jitted": jax.jit(averaged_params),
    "n_averaged": lambda state, params: n_averaged(state),
    "n_skipped": lambda state, params: n_skipped(state),
    "state_to_dict": lambda state, params: state_to_dict(state),
}

NOT_LAST = {
    "first": (optax.chain(swa(EVERY), optax.sgd(0.1)), "opt_state[0]"),
    "before the rate": (
        optax.chain(optax.scale_by_adam(), swa(EVERY), optax.scale(-0.1)),
        "opt_state[1]",
    ),
    "in an inner chain": (optax.chain(INNER, optax.keep_params_nonnegative()), "opt_state[0]"),
    "under MultiSteps": (
        optax.MultiSteps(optax.chain(swa(EVERY), optax.sgd(0.1)), 2),
        "opt_state.inner_opt_state[0]",
    ),
    "before a plateau": (
        optax.chain(INNER, optax.contrib.reduce_on_plateau()),
        "opt_state[0]",
    ),
    "masked": (
        optax.chain(optax.masked(swa(EVERY), True), optax.sgd(0.1)),
        "opt_state[0]",
    ),
    "in a partition": (
        optax.partition({"a": optax.chain(swa(EVERY), optax.sgd(0.1))}, "a"),
        "opt_state.inner_states['a'].inner_state[0]",
    ),
    "named": (
        optax.named_chain(("average", swa(EVERY)), ("optimizer", optax.sgd(0.1))),
        "opt_state['average']",
    ),
    # The names do not sort as the transformations do.
    "named, in the middle": (
        optax.named_chain(("z", optax.sgd(0.1)), ("m", swa(EVERY)), ("a", optax.identity())),
        "opt_state['m']",
    ),
}


@pytest.mark.parametrize("case", NOT_LAST)
def test_elsewhere_in_a_chain_the_average_is_refused_when_read(case):
    tx, place = NOT_LAST[case]
    params = params_like()
    for state in (tx.init(params), quick_jit(tx.init)(params)):
        for read in READERS.values():
            with pytest.raises(StateError, match="swa is not last in its chain") as error:
                read(state, params)
            assert f"{place} holds the average" in str(error.value)
            assert "Hint: make it optax.chain(..., swa(config))" in str(error.value)


def test_after_updates_it_is_refused_as_well():
    for tx in (NOT_LAST["first"][0], NOT_LAST["named"][0]):
        params, state, _ = trained(tx, 2)
        with pytest.raises(StateError, match="not last"):
            averaged_params(state, params)


ADVERSARY = optax.chain(optax.contrib.normalize(), INNER)
REPLACED = {
    "schedule_free": (
        optax.contrib.schedule_free(INNER, learning_rate=0.1),
        "inside of optax.contrib.schedule_free: opt_state.base_optimizer_state",
        "optax.chain(optax.contrib.schedule_free(...), swa(config))",
    ),
    "mechanize": (
        optax.contrib.mechanize(INNER),
        "inside of optax.contrib.mechanize: opt_state.base_optimizer_state",
        "optax.chain(optax.contrib.mechanize(...), swa(config))",
    ),
    "lookahead": (
        optax.lookahead(INNER, sync_period=2, slow_step_size=0.5),
        "inside of optax.lookahead: opt_state.fast_state",
        "optax.chain(optax.lookahead(...), swa(config))",
    ),
    "sam": (
        optax.contrib.sam(optax.sgd(0.1), ADVERSARY),
        "inside of the adversarial optimizer of optax.contrib.sam: opt_state.adv_state",
        "optax.contrib.sam(optax.chain(..., swa(config)), adv_optimizer)",
    ),
}


@pytest.mark.parametrize("case", REPLACED)
def test_inside_of_what_makes_other_updates_it_is_refused(case):
    tx, place, right = REPLACED[case]
    params = params_like()
    if case == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    for outer in (tx, optax.chain(optax.identity(), tx), optax.MultiSteps(tx, 2)):
        state = outer.init(params)
        for read in READERS.values():
            with pytest.raises(StateError) as error:
                read(state, params)
            assert "The average is not one of weights that the training had" in str(error.value)
            assert f"Hint: make it {right}." in str(error.value)
    with pytest.raises(StateError) as error:
        averaged_params(tx.init(params), params)
    assert place in str(error.value)


def test_the_states_that_are_refused_are_those_of_optax():
    # Refused by name, so that reading imports no contrib: the names must be real.
    from swa_optax.finding import _REPLACES_UPDATES

    for state, field in _REPLACES_UPDATES:
        kind = getattr(optax, state, None) or getattr(optax.contrib, state)
        assert field in kind._fields


NESTED = {
    "plain": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, True),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "partition": lambda tx: optax.partition({"a": tx}, "a"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "inject": lambda tx: optax.inject_hyperparams(lambda r: optax.chain(optax.scale(r), tx))(0.1),
    "condition": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("nested", NESTED)
def test_without_params_it_fails_when_traced(nested):
    tx = NESTED[nested](INNER)
    params = params_like()
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(StructureError, match="updated without the parameters") as error:
            update(params, state)
        assert "Hint: call tx.update(grads, state, params)" in str(error.value)


# What follows cannot be refused: the average is one of the training's weights, of each call.


def test_outside_of_multi_steps_it_counts_micro_steps():
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), swa(EVERY))
    params, state, visited = trained(tx, 12)
    assert n_averaged(state) == 12
    assert_average(state, params, visited)


def test_outside_of_multi_steps_times_in_micro_steps_are_right():
    config = {"start": "4step", "every": "4step"}
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), swa(config))
    params, state, visited = trained(tx, 12)
    assert n_averaged(state) == 3
    assert_average(state, params, visited[3::4])


def test_behind_apply_every_it_counts_micro_steps_too():
    for config, seen in (
        (EVERY, slice(None)),
        ({"start": "3step", "every": "3step"}, slice(2, 9, 3)),
    ):
        tx = optax.chain(optax.sgd(0.1), optax.apply_every(3), swa(config))
        params, state, visited = trained(tx, 9)
        assert_average(state, params, visited[seen])


@pytest.mark.parametrize(
    "skipping",
    [
        lambda tx: optax.apply_if_finite(tx, 5),
        lambda tx: optax.conditionally_mask(tx, lambda step, ok: ok, forward_extra_args=True),
        lambda tx: optax.MultiSteps(
            tx, 1, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
    ],
    ids=["apply_if_finite", "conditionally_mask", "MultiSteps"],
)
def test_outside_of_what_skips_updates_it_counts_the_same_parameters_again(skipping):
    tx = optax.chain(skipping(optax.adam(0.1)), swa(EVERY))
    params, state, visited = params_like(), tx.init(params_like()), []
    step = quick_jit(tx.update)
    for place, grads in enumerate(bad_at({2, 3}, gradients(5, params))):
        updates, state = step(grads, state, params, ok=jnp.array(place not in {2, 3}))
        params = optax.apply_updates(params, updates)
        visited.append(params)
    assert n_averaged(state) == 5
    assert_average(state, params, [visited[place] for place in (0, 1, 1, 1, 4)])


def test_a_second_average_is_refused_until_one_is_chosen():
    labels = {"dense": {"kernel": "a", "bias": "b"}}
    tx = optax.partition({"a": INNER, "b": optax.chain(optax.adam(0.1), swa(EVERY))}, labels)
    params, state, visited = trained(tx)
    with pytest.raises(StateError, match=r"2 averages: opt_state.inner_states\['a'\]"):
        averaged_params(state, params)
    # Each merges its part with what is live, so that both are read one after the other.
    once = averaged_params(state.inner_states["a"], params)
    assert once["dense"]["bias"] is params["dense"]["bias"]
    assert_close(averaged_params(state.inner_states["b"], once), mean(visited))
