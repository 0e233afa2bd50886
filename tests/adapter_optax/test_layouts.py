"""Inside of wrappers that lay the parameters out otherwise, and reading it as the parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
    quick_jit,
    same_bits,
    train,
    trained,
)

from swa_core import StructureError
from swa_optax import averaged_params, finalize, state_from_dict, state_to_dict, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")

INNER = optax.chain(optax.adam(0.1), swa(EVERY))


def complex_gradients(n, params):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield {
            "w": jnp.asarray(rng.standard_normal(3) + 1j * rng.standard_normal(3), "c8"),
            "b": jnp.asarray(rng.standard_normal(2), "f4"),
        }


COMPLEX = {"w": jnp.array([1 + 2j, 0j, -1j], "c8"), "b": jnp.ones(2)}


def test_flatten_around_is_read_as_the_parameters():
    params, state, visited = trained(optax.flatten(INNER))
    assert state[1].average.shape == (9,)
    assert_average(state, params, visited)
    for read in (finalize, quick_jit(averaged_params)):
        assert_close(read(state, params), mean(visited))


def test_flatten_around_an_average_in_the_memory_of_the_host():
    inner = optax.chain(optax.sgd(0.1), swa(EVERY, memory_kind="pinned_host"))
    start = jax.device_put(params_like(), jax.devices()[0])
    tx = optax.flatten(inner)
    _, state = quick_jit(tx.update)(start, quick_jit(tx.init)(start), start)
    assert state[1].average.sharding.memory_kind == "pinned_host"
    for read in (averaged_params, quick_jit(averaged_params)):
        assert_close(read(state, start), jax.tree.map(lambda leaf: 0.9 * leaf, start))


def test_flatten_of_the_optimizer_alone():
    params, state, visited = trained(optax.chain(optax.flatten(optax.adam(0.1)), swa(EVERY)))
    assert_average(state, params, visited)


def test_flatten_of_one_matrix():
    start = jnp.ones((2, 3))
    grads = [jnp.full((2, 3), value) for value in (1.0, -2.0, 3.0)]
    params, state, visited = train(optax.flatten(INNER), grads, start)
    assert state[1].average.shape == (6,)
    assert_average(state, params, visited)


def test_flatten_leaves_integers_live():
    params = {"steps": jnp.array([3, 4]), "w": jnp.array([1.0, 2.0])}
    tx = optax.flatten(swa(EVERY))
    _, state = tx.update({"steps": jnp.zeros(2), "w": jnp.ones(2)}, tx.init(params), params)
    read = averaged_params(state, params)
    assert read["steps"] is params["steps"]
    np.testing.assert_array_equal(read["w"], [2, 3])


def test_flatten_of_other_parameters_is_refused():
    state = optax.flatten(INNER).init(params_like())
    with pytest.raises(StructureError, match="no floating-point leaf ''"):
        averaged_params(state, params_like() | {"more": jnp.ones(1)})


def test_a_vector_alone_is_no_flattened_tree():
    params = jnp.arange(3.0)
    state = swa(EVERY).init(params)
    with pytest.raises(StructureError, match=r"leaf '' has shape \(4,\), but .* holds \(3,\)"):
        averaged_params(state, jnp.ones(4))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_split_real_and_imaginary(where):
    split = optax.contrib.split_real_and_imaginary
    tx = split(INNER) if where == "inside" else optax.chain(split(optax.adam(0.1)), swa(EVERY))
    params, state, visited = train(tx, complex_gradients(4, COMPLEX), COMPLEX)
    for read in (averaged_params, finalize, quick_jit(averaged_params)):
        got = read(state, params)
        assert got["w"].dtype == jnp.complex64
        assert_close(got, {name: np.mean([v[name] for v in visited], axis=0) for name in params})


def test_split_of_one_complex_array():
    split = optax.contrib.split_real_and_imaginary(optax.chain(optax.sgd(1.0), swa(EVERY)))
    params = jnp.array([1 + 1j, 2 - 3j])
    params, state, _ = train(split, [jnp.array([1j, 1 + 0j])], params)
    np.testing.assert_array_equal(averaged_params(state, params), [1, 1 - 3j])


def test_parameters_named_real_and_imaginary_are_themselves():
    params = {"real": jnp.ones(2), "imaginary": jnp.zeros(2)}
    state = swa({"start": "1step", "every": "1step"}).init(params)
    state = state._replace(n_averaged=jnp.int32(1))
    assert_close(averaged_params(state, params), params)


def test_saved_and_resumed_in_the_layout_it_is_in():
    for tx, grads, params in (
        (optax.flatten(INNER), gradients(3, params_like()), params_like()),
        (
            optax.contrib.split_real_and_imaginary(INNER),
            complex_gradients(3, COMPLEX),
            COMPLEX,
        ),
    ):
        _, state, _ = train(tx, grads, params)
        resumed = state_from_dict(state_to_dict(state), tx.init(params))
        same_bits(averaged_params(resumed, params), averaged_params(state, params))
