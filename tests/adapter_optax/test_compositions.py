"""At the end of chains, under injected hyperparameters, and around lookahead."""

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
    gradients,
    mean,
    params_like,
    same_bits,
    train,
    trained,
)
from optax.experimental import aggregating

from swa_core import StructureError, SWAConfig
from swa_optax import averaged_params, n_averaged, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")


CHAINS = {
    "last in a chain": lambda: optax.chain(optax.clip(1.0), optax.adam(0.1), swa(EVERY)),
    "alone in a chain": lambda: optax.chain(optax.sgd(0.1), optax.chain(swa(EVERY))),
    "at the ends of chains": lambda: optax.chain(
        optax.identity(),
        optax.masked(
            optax.chain(optax.clip(1.0), optax.chain(optax.scale(-0.1), swa(EVERY))), True
        ),
    ),
    # The names do not sort as the transformations do.
    "named": lambda: optax.named_chain(("z", optax.adam(0.1)), ("a", swa(EVERY))),
    "with what only looks": lambda: optax.chain(
        optax.sgd(0.1),
        optax.snapshot("norm", optax.tree.norm),
        optax.with_extra_args_support(swa(EVERY)),
    ),
    "behind what changes updates": lambda: optax.chain(
        optax.centralize(),
        optax.add_noise(0.1, 0.5, key=0),
        optax.zero_nans(),
        optax.adaptive_grad_clip(0.1),
        optax.sgd(0.1),
        optax.keep_params_nonnegative(),
        swa(EVERY),
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_in_chains(case):
    params, state, visited = trained(CHAINS[case]())
    assert_average(state, params, visited)


def test_under_a_chain_of_per_example_gradients():
    # The gradients have an axis more than the parameters, the updates at the end have not.
    tx = aggregating.process(
        optax.identity(),
        aggregating.average_incrementally_updates(per_elt_axis=0, accumulation_steps=2),
        optax.chain(optax.sgd(0.1), swa(EVERY)),
    )
    start = params_like()
    grads = gradients(6, jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), start))
    params, state, visited = train(tx, grads, start)
    assert n_averaged(state) == 3
    assert_average(state, params, visited[1::2])


def test_inject_hyperparams_beside():
    tx = optax.chain(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), swa(EVERY))
    params, state, visited = trained(tx)
    assert_average(state, params, visited)


def test_inject_hyperparams_around():
    @optax.inject_hyperparams
    def make(learning_rate):
        return optax.chain(optax.adam(learning_rate), swa(EVERY))

    params, state, visited = trained(make(learning_rate=optax.linear_schedule(0.1, 0.0, 8)))
    assert_average(state, params, visited)
    # Both make the transformation anew in every update: nothing is kept outside of the state.
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.1 * 5 / 8)


def test_inject_hyperparams_around_swa_itself():
    # A configuration is no number, so it stays what it is; lengths have to be named static.
    settings = SWAConfig(start="1ep", every="1ep")
    injected = optax.inject_hyperparams(swa, static_args=("steps_per_epoch", "total_steps"))
    tx = optax.chain(optax.sgd(0.1), injected(settings, steps_per_epoch=3))
    params, state, visited = trained(tx, 7)
    assert_average(state, params, visited[2::3])
    plain = optax.chain(optax.sgd(0.1), swa(settings, steps_per_epoch=3))
    _, expected, _ = trained(plain, 7)
    same_bits(state[1].inner_state, expected[1])


def look(params):
    return optax.LookaheadParams.init_synced(params)


def test_behind_lookahead_fast_and_slow_are_averaged():
    # As it is with any pair of trees: what one evaluates with, slow, has its average in it.
    optimizer = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    ends = []
    for tx in (optimizer, optax.chain(optimizer, swa(EVERY))):
        params, state, visited = train(
            tx, gradients(6, params_like()), look(params_like()), jit=jax.jit
        )
        ends.append(params)
    same_bits(*ends)
    assert_average(state, params, visited)
    got = averaged_params(state, params)
    assert isinstance(got, optax.LookaheadParams)
    assert_close(got.slow, mean([pair.slow for pair in visited]))
    with pytest.raises(StructureError, match="no floating-point leaf 'fast/dense/bias'"):
        averaged_params(state, params.slow)


def test_behind_lookahead_slow_parameters_alone():
    # Those change once in sync_period updates; a mask leaves the fast ones out.
    tx = optax.chain(
        optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5),
        optax.masked(
            swa({"start": "2step", "every": "2step"}), optax.LookaheadParams(fast=False, slow=True)
        ),
    )
    params, state, visited = train(tx, gradients(6, params_like()), look(params_like()))
    got = averaged_params(state, params)
    assert n_averaged(state) == 3
    assert_close(got.slow, mean([pair.slow for pair in visited[1::2]]))
    assert got.fast["dense"]["bias"] is params.fast["dense"]["bias"]


def test_extra_arguments_reach_the_others_and_any_are_taken():
    seen = []

    def watch(updates, state, params=None, *, value, batch, **others):
        seen.append((value, batch.shape, sorted(others)))
        return updates, state

    watching = optax.GradientTransformationExtraArgs(optax.init_empty_state, watch)
    tx = optax.chain(optax.sgd(0.1), watching, swa(EVERY), watching)
    trained(tx, 1, value=1.5, batch=jnp.ones((2, 2)), anything=None)
    assert seen == [(1.5, (2, 2), ["anything"])] * 2


def test_it_is_a_transformation_with_extra_arguments():
    tx = swa(EVERY)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx


@pytest.mark.parametrize(
    ("optimizer", "around"),
    [
        (optax.sgd(0.1, momentum=0.9, nesterov=True), lambda tx: optax.MultiSteps(tx, 2)),
        (optax.adamw(0.1), lambda tx: optax.apply_if_finite(tx, 2)),
    ],
    ids=["MultiSteps", "apply_if_finite"],
)
def test_composed_it_changes_no_bit_of_the_training(optimizer, around):
    plain, averaging = around(optimizer), around(optax.chain(optimizer, swa(EVERY)))
    same_bits(trained(averaging, jit=jax.jit)[2], trained(plain, jit=jax.jit)[2])
