"""Inside of JAX' own transformations: loops, ensembles, derivatives, rematerialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import EVERY, mean, quick_jit, same_bits

from swa_core import SWAConfig
from swa_optax import averaged_params, n_averaged, n_skipped, swa, wrap

SECOND = SWAConfig(start="2step", every="2step")


def loss(params, x):
    return jnp.square(jnp.tanh(x @ params["w"]) @ params["v"]).sum()


def params_like():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.1 * rng.standard_normal((3, 3)), jnp.float32) for name in "vw"}


def inputs(n):
    return jnp.asarray(np.random.default_rng(1).standard_normal((n, 2, 3)), jnp.float32)


def stepper(tx):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def chain(config=SECOND):
    return optax.chain(optax.sgd(0.1), swa(config))


def by_hand(n, config=SECOND):
    """The loop that all others are held against."""
    tx, params = chain(config), params_like()
    step, state, visited = quick_jit(stepper(tx)), tx.init(params), []
    for x in inputs(n):
        params, state = step(params, state, x)
        visited.append(params)
    return params, state, visited


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, expected)


def test_scan_over_epochs_of_steps():
    tx, xs = chain(), inputs(6).reshape(3, 2, 2, 3)
    step = stepper(tx)

    @quick_jit
    def train(params, state):
        def epoch(carry, xs):
            carry, _ = jax.lax.scan(lambda c, x: (step(*c, x), None), carry, xs)
            params, state = carry
            return carry, (averaged_params(state, params), n_averaged(state))

        return jax.lax.scan(epoch, (params, state), xs)

    end, (evaluated, counts) = train(params_like(), tx.init(params_like()))
    params, state, visited = by_hand(6)
    assert_same(end, (params, state))
    assert counts.tolist() == [1, 2, 3]
    last = jax.tree.map(lambda leaf: leaf[-1], evaluated)
    assert_same(last, mean(visited[1::2]))


def test_fori_and_while_loops():
    tx, xs = chain(), inputs(6)
    step = stepper(tx)

    @quick_jit
    def until_three_snapshots(params, state):
        def body(carry):
            place, params, state = carry
            return (place + 1, *step(params, state, xs[place]))

        def waiting(carry):
            return n_averaged(carry[2]) < 3

        return jax.lax.while_loop(waiting, body, (jnp.int32(0), params, state))

    @quick_jit
    def six(params, state):
        return jax.lax.fori_loop(0, 6, lambda i, c: step(*c, xs[i]), (params, state))

    params, state, _ = by_hand(6)
    start = params_like(), tx.init(params_like())
    assert_same(until_three_snapshots(*start), (jnp.int32(6), params, state))
    assert_same(six(*start), (params, state))


def test_checkpointed_steps_and_their_gradient():
    # As in meta-learning: the training is differentiated, and its steps are computed again.
    tx, xs = chain(EVERY), inputs(3)

    def after(params, remat):
        step = jax.checkpoint(stepper(tx)) if remat else stepper(tx)
        state = tx.init(params)
        (params, state), _ = jax.lax.scan(lambda c, x: (step(*c, x), None), (params, state), xs)
        return loss(averaged_params(state, params), xs[0])

    plain, remat = (
        quick_jit(jax.value_and_grad(after), static_argnums=1)(params_like(), r)
        for r in (False, True)
    )
    assert_same(remat, plain)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(plain[1]))


def test_derivatives_are_those_of_the_mean():
    # d/dr of the mean of (1 - r), (1 - r)^2, (1 - r)^3; forward, backward and twice.
    tx = optax.chain(optax.sgd(1.0), swa(EVERY))

    def after(rate):
        params = {"w": jnp.float32(1)}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update({"w": rate * params["w"]}, state, params)
            params = optax.apply_updates(params, updates)
        return averaged_params(state, params)["w"]

    rate, q = jnp.float32(0.25), 0.75
    first, second = -(1 + 2 * q + 3 * q**2) / 3, (2 + 6 * q) / 3
    assert float(quick_jit(jax.jacfwd(after))(rate)) == pytest.approx(first, rel=1e-6)
    assert float(quick_jit(jax.jacrev(after))(rate)) == pytest.approx(first, rel=1e-6)
    assert float(quick_jit(jax.hessian(after))(rate)) == pytest.approx(second, rel=1e-6)


def test_no_gradient_is_nan_where_a_branch_was_not_taken():
    # vmap makes selects of the conditions, and derivatives go through both of their sides.
    tx = swa(SECOND)

    def after(w, state):
        for offset in (1.0, jnp.nan, 2.0, 3.0):
            _, state = tx.update({"w": jnp.zeros_like(w)}, state, {"w": w + offset})
        return averaged_params(state, {"w": w})["w"].sum()

    state = tx.init({"w": jnp.zeros(3)})
    got = quick_jit(jax.vmap(jax.grad(after), in_axes=(0, None)))(jnp.ones((2, 3)), state)
    np.testing.assert_array_equal(got, 1)


@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "wrap"])
def test_members_of_an_ensemble_skip_for_themselves(wrapped):
    # Of three trainings at three rates, one diverges, and its average stays where it was.
    @quick_jit
    @jax.vmap
    def train(rate, params):
        inner = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
        tx = wrap(inner, EVERY) if wrapped else optax.chain(inner, swa(EVERY))
        state = tx.init(params)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update({"w": params["w"] ** 3}, state, params)
            return (optax.apply_updates(params, updates), state), params

        return jax.lax.scan(step, (params, state), None, length=12)

    rates = jnp.array([0.01, 1e3, 0.1], jnp.float32)
    (params, state), before = train(rates, {"w": jnp.full((3, 2), 2.0)})
    made = np.concatenate([before["w"][:, 1:], params["w"][:, None]], axis=1)
    finite = np.isfinite(made).all(axis=2)
    assert n_averaged(state).tolist() == finite.sum(1).tolist()
    assert n_skipped(state).tolist() == (~finite).sum(1).tolist()
    assert n_skipped(state).tolist()[0::2] == [0, 0]
    assert n_skipped(state).tolist()[1] > 0
    read = jax.vmap(averaged_params)(state, params)["w"]
    for member in range(3):
        expected = made[member][finite[member]].astype(np.float64).mean(0)
        np.testing.assert_allclose(read[member], expected, rtol=1e-5)


def test_an_ensemble_of_ensembles():
    tx = swa(SECOND)
    params = {"w": jnp.arange(12.0).reshape(2, 3, 2)}
    init, update = jax.vmap(jax.vmap(tx.init)), quick_jit(jax.vmap(jax.vmap(tx.update)))
    state = init(params)
    for turn in range(1, 5):
        _, state = update({"w": jnp.zeros((2, 3, 2))}, state, {"w": turn * params["w"]})
    np.testing.assert_array_equal(n_averaged(state), np.full((2, 3), 2))
    np.testing.assert_array_equal(state.average["w"], 3 * params["w"])


def test_without_jit_at_all():
    expected = by_hand(3)[:2]
    with jax.disable_jit():
        tx, params = chain(), params_like()
        step, state = quick_jit(stepper(tx)), tx.init(params)
        for x in inputs(3):
            params, state = step(params, state, x)
        assert_same((params, state), expected)
        assert n_averaged(state) == 1


def test_a_custom_derivative_around_a_whole_training():
    # Averaged parameters as a function of the data, with a straight-through derivative.
    tx = chain(EVERY)

    @jax.custom_vjp
    def trained(params, xs):
        step = stepper(tx)
        (params, state), _ = jax.lax.scan(
            lambda c, x: (step(*c, x), None), (params, tx.init(params)), xs
        )
        return averaged_params(state, params)

    trained.defvjp(lambda p, xs: (trained(p, xs), None), lambda _, g: (g, None))
    grads = quick_jit(jax.grad(lambda p: trained(p, inputs(2))["w"].sum()))(params_like())
    same_bits(grads, {"v": jnp.zeros((3, 3)), "w": jnp.ones((3, 3))})
