"""What the compiler makes of it: one compilation, no copies, scan, vmap, donation, shardings."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import EMA, SWAConfig
from swa_optax import averaged_params, n_averaged, n_skipped, swa

CONFIG = SWAConfig(start="3step", every="2step")


def make_step(tx):
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.square(jnp.tanh(x @ p["w"]) @ p["v"]).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def params_like(size=3):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.1 * rng.standard_normal((size, size)), jnp.float32) for name in "vw"
    }


def inputs(n, size=3):
    return jnp.asarray(np.random.default_rng(1).standard_normal((n, 2, size)), jnp.float32)


def test_compiles_once_and_traces_once():
    traced, tx = [], optax.chain(optax.sgd(0.1, momentum=0.9), swa(CONFIG))

    @jax.jit
    def step(params, state, x):
        traced.append(1)
        return make_step(tx)(params, state, x)

    params = params_like()
    state = tx.init(params)
    for x in inputs(6):
        params, state = step(params, state, x)
    assert len(traced) == 1
    assert step._cache_size() == 1


def test_jitted_init_leads_to_the_same_compilation_as_eager_init():
    tx = optax.chain(optax.sgd(0.1), swa(CONFIG))
    step, params = jax.jit(make_step(tx)), params_like()
    for init in (tx.init, jax.jit(tx.init)):
        step(params, init(params), inputs(1)[0])
    assert step._cache_size() == 1


def test_eager_jitted_and_scanned_agree():
    tx = optax.chain(optax.sgd(0.1), swa(CONFIG))
    step, xs, ends = make_step(tx), inputs(8), []
    for run in (step, jax.jit(step)):
        params = params_like()
        state = tx.init(params)
        for x in xs:
            params, state = run(params, state, x)
        ends.append((params, state))

    @jax.jit
    def epoch(params, state, xs):
        def body(carry, x):
            return step(*carry, x), n_averaged(carry[1])

        return jax.lax.scan(body, (params, state), xs)

    scanned, counts = epoch(params_like(), tx.init(params_like()), xs)
    assert counts.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    for other in (ends[0], scanned):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, ends[1])


def test_vmap_gives_each_member_its_own_counters():
    tx = swa(CONFIG)
    state = jax.vmap(tx.init)({"w": jnp.zeros((3, 2))})
    values = [np.array([1, np.nan, update]) for update in range(6)]
    for value in values:
        params = {"w": jnp.asarray(np.repeat(value[:, None], 2, 1), jnp.float32)}
        _, state = jax.jit(jax.vmap(tx.update))({"w": jnp.zeros((3, 2))}, state, params)
    assert n_averaged(state).tolist() == [2, 0, 2]
    assert n_skipped(state).tolist() == [0, 2, 0]
    read = jax.vmap(averaged_params)(state, {"w": jnp.full((3, 2), 7.0)})
    np.testing.assert_array_equal(read["w"][:, 0], [1, 7, 3])


def test_differentiable_around():
    tx = optax.chain(optax.sgd(0.5), swa(SWAConfig(start="1step", every="1step")))

    def after_two_updates(rate):
        params = {"w": jnp.ones(2)}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({"w": rate * params["w"]}, state, params)
            params = optax.apply_updates(params, updates)
        return averaged_params(state, params)["w"].sum()

    got = jax.jit(jax.grad(after_two_updates))(0.2)
    expected = jax.grad(lambda r: (1 - r / 2) + (1 - r / 2) ** 2)(0.2)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def donated(tx, size=256):
    params = params_like(size)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    return step.lower(params, tx.init(params), inputs(1, size)[0]).compile()


@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)], ids=["momentum", "sgd"]
)
def test_donated_it_needs_the_average_and_nothing_besides(nonfinite, optimizer):
    config = SWAConfig(start="9step", every="9step", nonfinite=nonfinite)
    plain, averaging = donated(optimizer), donated(optax.chain(optimizer, swa(config)))
    copies = [len(re.findall(r"f32\[256,256\]\S* copy\(", c.as_text())) for c in (plain, averaging)]
    assert copies[1] <= copies[0]
    before, after = plain.memory_analysis(), averaging.memory_analysis()
    average = 2 * 4 * 256 * 256
    slack = 4096  # counters
    assert after.temp_size_in_bytes - before.temp_size_in_bytes < slack
    assert after.alias_size_in_bytes - before.alias_size_in_bytes >= average
    assert after.output_size_in_bytes - before.output_size_in_bytes < average + slack
    # What a snapshot costs stands under a condition, so that a skipped update does not pay it.
    assert " conditional(" in averaging.as_text()
    assert " conditional(" not in plain.as_text()


@pytest.mark.parametrize("nonfinite", ["keep", "skip"])
def test_no_temporaries(nonfinite):
    tx = swa(SWAConfig(start="9step", every="9step", nonfinite=nonfinite))

    def apply(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    params = params_like(256)
    compiled = (
        jax.jit(apply, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_donation_never_meets_a_buffer_twice():
    tx = optax.chain(optax.sgd(0.1), swa(SWAConfig(start="1step", every="1step")))
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        params = params_like()
        state = init(params)
        for x in inputs(3):
            params, state = step(params, state, x)
        lent = averaged_params(state, params)
        # The lent average is trained on and donated, and the state that lent it too.
        step(lent, state, inputs(1)[0])
        assert lent["w"].is_deleted()


def test_the_average_is_a_copy_at_init():
    params = {"w": jnp.ones(4), "host": np.ones(4, np.float32)}
    state = swa(CONFIG).init(params)
    params["host"][:] = 7
    np.testing.assert_array_equal(state.average["host"], 1)
    assert state.average["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_abstract_init():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa(CONFIG))
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "steps": jnp.array(1)}
    shapes = jax.eval_shape(tx.init, params)
    assert shapes[1].average["w"].dtype == jnp.float32
    assert shapes[1].average["steps"] is None
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    state = tx.init(abstract)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert jax.eval_shape(lambda: tx.init(params))[1] == shapes[1]


def test_the_average_keeps_the_sharding_of_the_parameters():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    named = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.ones((4, 2), jnp.bfloat16), named)}
    for init in (swa(CONFIG).init, jax.jit(swa(CONFIG).init)):
        assert init(params).average["w"].sharding == named


def test_nothing_goes_to_the_host():
    config = SWAConfig(start="2step", every="1step", rule=EMA(0.5))
    tx = optax.chain(optax.sgd(0.1), swa(config))
    step, params, x = jax.jit(make_step(tx)), params_like(), inputs(1)[0]
    state = tx.init(params)
    step(params, state, x)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            params, state = step(params, state, x)
    assert n_averaged(state) == 1
