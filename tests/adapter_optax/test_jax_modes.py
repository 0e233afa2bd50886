"""Under the modes in which JAX looks for mistakes: none of them is ours."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import quick_jit, same_bits
from jax.experimental import checkify

from swa_core import EMA, SWAConfig, Uniform
from swa_optax import averaged_params, finalize, n_averaged, n_skipped, swa, wrap

CONFIGS = [
    SWAConfig(start="2step", every="2step", rule=rule, nonfinite=nonfinite)
    for rule, nonfinite in itertools.product((Uniform(), EMA(0.9)), ("skip", "keep"))
]
SKIP, *_, KEEP_EMA = CONFIGS


def run(config, n=4, make=None):
    """A short training on one device, jitted; nothing but the step runs in the loop."""
    tx = make(config) if make else optax.chain(optax.sgd(0.1), swa(config))

    @quick_jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {}
    grads = {"w": jnp.full((2, 3), 0.5), "b": jnp.full(3, -0.5)}
    state = tx.init(params)
    for _ in range(n):
        params, state = step(params, state, grads)
    return params, state, step


@pytest.mark.parametrize("config", [SKIP, KEEP_EMA], ids=["skip", "ema-keep"])
def test_debug_nans_and_infs_find_none_of_ours(config):
    with jax.debug_nans(True), jax.debug_infs(True):
        params, state, _ = run(config)
        assert n_averaged(state) == 2
        averaged_params(state, params)
    tx, params = swa(config), {"w": jnp.ones(3)}
    state = tx.init(params)
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):  # each operation by itself
        for _ in range(2):
            _, state = tx.update(params, state, params)
    assert n_averaged(state) == 1


def test_no_tracer_leaks():
    with jax.checking_leaks():
        params, state, _ = run(SKIP)
        jax.jit(averaged_params)(state, params)

        def scanned(params, state):
            tx = wrap(optax.sgd(0.1), SKIP)  # a transformation made while tracing

            def body(carry, _):
                params, state = carry
                updates, state = tx.update(params, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(body, (params, state), None, length=3)[0]

        quick_jit(scanned)(params, wrap(optax.sgd(0.1), SKIP).init(params))


@pytest.mark.parametrize("config", [SKIP, KEEP_EMA], ids=["skip", "ema-keep"])
def test_a_step_moves_nothing_between_host_and_device(config):
    params, state, step = run(config, n=1)
    grads = {"w": jnp.full((2, 3), 0.5), "b": jnp.full(3, -0.5)}
    with jax.transfer_guard("disallow_explicit"):
        for _ in range(3):
            params, state = step(params, state, grads)
    assert n_averaged(state) == 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.rule}-{config.nonfinite}")
def test_no_callback_and_no_effect_in_what_is_traced(config):
    params = {"w": jnp.ones(3), "key": jax.random.key(0)}
    updates = {"w": jnp.ones(3), "key": None}
    for tx in (swa(config), wrap(optax.identity(), config)):
        state = tx.init(params)
        for traced in (
            jax.make_jaxpr(tx.update)(updates, state, params),
            jax.make_jaxpr(averaged_params)(state, params),
            jax.make_jaxpr(tx.init)(params),
        ):
            assert not traced.effects
            assert not re.search("callback|infeed|outfeed|print|device_put", str(traced))


def test_keys_are_not_used_twice(relaxed_jax):
    # A key among the parameters is handed on and never consumed; add_noise's splits are its own.
    def make(config):
        return optax.chain(
            optax.sgd(0.1), optax.add_noise(0.1, 0.5, key=jax.random.key(1)), swa(config)
        )

    with jax.debug_key_reuse(True):
        _, state, _ = run(SKIP, make=make)
        assert n_averaged(state) == 2
        tx, key = swa(SKIP), jax.random.key(0)
        updates = {"w": jnp.ones(2), "key": None}
        state = tx.init({"w": jnp.ones(2), "key": key})

        @quick_jit
        def step(params, state):
            _, state = tx.update(updates, state, params)
            return averaged_params(state, params), state

        for _ in range(3):
            read, state = step({"w": jnp.ones(2), "key": key}, state)
        assert n_averaged(state) == 1
        jax.random.normal(read["key"])  # still unused


def test_internal_checks_of_jax():
    with jax.enable_checks(True):
        params, state, _ = run(SKIP)
        averaged_params(state, params)


def test_checkify_finds_nothing():
    tx = optax.chain(optax.sgd(0.1), swa(SKIP))

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    checked = quick_jit(
        checkify.checkify(step, errors=checkify.float_checks | checkify.index_checks)
    )
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2):
        error, (params, state) = checked(params, state)
        error.throw()
    assert n_averaged(state) == 1


def test_infinite_weights_are_left_out_under_debug_nans_too():
    # What looks for them makes NaN of them on its way, which no result of a step holds.
    tx, params = swa(SKIP), {"w": jnp.array([1.0, np.inf], jnp.float32)}
    state = tx.init(params)
    with jax.debug_nans(True):
        for _ in range(2):
            _, state = quick_jit(tx.update)({"w": jnp.zeros(2)}, state, params)
    assert (n_averaged(state), n_skipped(state)) == (0, 1)


def test_any_promotion_of_dtypes_and_ranks_gives_the_same_bits(x64):
    params = {"half": jnp.ones(3, jnp.bfloat16), "w": jnp.ones((2, 3), "f4")}
    shares = [jax.tree.map(lambda leaf, k=k: np.asarray(k * leaf / 4), params) for k in range(4)]
    tx, ends = swa(KEEP_EMA), []
    for dtypes, ranks in (("strict", "raise"), ("standard", "allow")):
        with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
            state, update = tx.init(params), quick_jit(tx.update)
            for updates in shares:
                _, state = update(updates, state, params)
            ends.append((state, averaged_params(state, params)))
    same_bits(*ends)


def test_x64_may_be_turned_on_around_a_state_made_without():
    # As it happens where a library turns it on late: float32 stays what it is.
    tx, params = swa(SKIP), {"w": jnp.ones(3)}
    state = tx.init(params)
    for turn, on in enumerate((True, False, True, False)):
        with jax.enable_x64(on):
            _, state = quick_jit(tx.update)({"w": jnp.full(3, turn, jnp.float32)}, state, params)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert dtypes == [np.int32, np.int32, np.int32, np.float32, np.float32]
    assert n_averaged(state) == 2
    np.testing.assert_array_equal(finalize(state, params)["w"], 1 + (1 + 3) / 2)


def test_two_configurations_in_one_program_do_not_meet():
    # Transformations hold no state: two of them, and each of them twice, in one compiled step.
    first, second = swa(SKIP), swa(SWAConfig(start="1step", every="1step", rule=EMA(0.5)))
    params = {"w": jnp.ones(2)}

    @quick_jit
    def step(states, params):
        return [
            tx.update(params, s, params)[1]
            for tx, s in zip((first, second, first), states, strict=True)
        ]

    states = [first.init(params), second.init(params), first.init(params)]
    for _ in range(4):
        states = step(states, params)
    assert [n_averaged(state) for state in states] == [2, 4, 2]
    same_bits(states[0], states[2])
    assert step._cache_size() == 1
