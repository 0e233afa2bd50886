"""The state keeps its types: shapes, dtypes, weakness and shardings, whatever goes in.

What holds of the types when tracing holds of any number of steps: one compilation, and carries of
``scan``, ``cond`` and ``while_loop``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import EVERY, params_like, quick_jit

from swa_core import EMA, Polynomial, SWAConfig
from swa_optax import averaged_params, swa, wrap

RULES = {
    "uniform": EVERY,
    "ema": SWAConfig(start="1step", every="1step", rule=EMA(0.9)),
    "polynomial": SWAConfig(start="1step", every="1step", rule=Polynomial(eta=2), nonfinite="keep"),
}

LEAVES = {
    "float16": lambda: jnp.ones(3, "float16"),
    "bfloat16": lambda: jnp.ones(3, "bfloat16"),
    "float32": lambda: jnp.ones(3, "float32"),
    "float64": lambda: jnp.ones(3, "float64"),
    "complex64": lambda: jnp.ones(3, "complex64"),
    "complex128": lambda: jnp.ones(3, "complex128"),
    "python float": lambda: 1.0,
    "python complex": lambda: 1j,
    "weak array": lambda: jnp.asarray(1.0),
    "numpy float32": lambda: np.float32(1),
    "numpy float64": lambda: np.ones(3),
    "integer": lambda: jnp.arange(3),
    "key": lambda: jax.random.key(0),
    "empty": lambda: jnp.ones((0, 3)),
}


def types(tree):
    """The types of the leaves with all that could make JAX compile again."""
    return jax.tree.map(
        lambda leaf: (
            jax.typeof(leaf)
            if not isinstance(leaf, jax.ShapeDtypeStruct)
            else (leaf.shape, leaf.dtype, leaf.weak_type)
        ),
        tree,
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_the_state_is_a_fixed_point_of_types(leaf, rule, x64):
    if leaf in ("float64", "complex128") and not x64:
        return  # JAX makes no such arrays then
    tx, params = swa(RULES[rule]), {"w": LEAVES[leaf](), "other": jnp.ones(2)}
    updates = {"w": None if leaf in ("integer", "key") else params["w"], "other": jnp.ones(2)}
    state = tx.init(params)

    def step(state, turn):
        # Under a condition, where both branches must agree.
        return jax.lax.cond(turn, lambda: tx.update(updates, state, params)[1], lambda: state)

    closed = jax.make_jaxpr(step)(state, True)
    assert list(closed.out_avals) == [jax.typeof(leaf) for leaf in jax.tree.leaves(state)]
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert types(jax.eval_shape(tx.init, params)) == types(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
@pytest.mark.parametrize("grads", ["bfloat16", "float32"])
def test_updates_of_any_dtype_leave_the_state_as_it_is(dtype, grads, relaxed_jax):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa(EVERY))
    params = {"w": jnp.ones(3, dtype)}
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, {"w": jnp.ones(3, grads)}, state, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, new[1]) == jax.tree.map(
        lambda leaf: leaf.dtype, state[1]
    )
    plain, _ = jax.eval_shape(
        optax.sgd(0.1, momentum=0.9).update, {"w": jnp.ones(3, grads)}, state[0], params
    )
    assert types(updates) == types(plain)


def test_python_floats_cost_no_compilation_that_optax_does_not_cost(relaxed_jax):
    counts = []
    for tx in (
        optax.sgd(0.1),
        optax.chain(optax.sgd(0.1), swa(EVERY)),
        wrap(optax.sgd(0.1), EVERY),
    ):

        @quick_jit
        def step(params, state, tx=tx):
            updates, state = tx.update({"scale": params["scale"], "w": params["w"]}, state, params)
            return optax.apply_updates(params, updates), state

        params = {"scale": 0.5, "w": jnp.ones(2)}
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        counts.append(step._cache_size())
    # apply_updates makes a strong float32 of it, which is the second.
    assert counts == [2, 2, 2]
    assert averaged_params(state, params)["scale"].dtype == jnp.float32


WRAPPED = {
    "plain": lambda: optax.chain(optax.adam(0.1), swa(EVERY)),
    "wrap": lambda: wrap(optax.adam(0.1), EVERY),
    "wrapped MultiSteps": lambda: wrap(optax.MultiSteps(optax.sgd(0.1), 2), EVERY),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(optax.sgd(0.1), swa(EVERY)), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(optax.sgd(0.1), swa(EVERY)), 2),
    "masked": lambda: optax.chain(
        optax.sgd(0.1), optax.masked(swa(EVERY), {"dense": {"kernel": True, "bias": False}})
    ),
    "partition": lambda: optax.partition(
        {"a": optax.chain(optax.adam(0.1), swa(EVERY)), "b": optax.set_to_zero()},
        {"dense": {"kernel": "a", "bias": "b"}},
    ),
    "inject": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), swa(EVERY))
    )(0.1),
    "condition": lambda: optax.conditionally_mask(
        optax.chain(optax.sgd(0.1), swa(EVERY)), lambda step: step % 2 == 0
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_abstract_init_has_the_structure_and_types_of_the_real_one(case, relaxed_jax):
    tx, params = WRAPPED[case](), params_like()
    state = tx.init(params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    expected = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), state)
    for abstract in (
        jax.eval_shape(tx.init, params),
        jax.eval_shape(tx.init, shapes),
        jax.eval_shape(lambda: tx.init(params)),
        jax.eval_shape(tx.update, params, state, params)[1],
    ):
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
        assert found == expected
    if case not in ("inject",):  # which looks at dtypes as arrays have them
        assert jax.tree.structure(tx.init(shapes)) == jax.tree.structure(state)


@pytest.fixture
def explicit_mesh():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


# Under apply_if_finite and conditionally_mask, the zeros of optax itself have no sharding type.
SHARDED = ["plain", "wrap", "wrapped MultiSteps", "MultiSteps", "masked", "partition"]


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sharding_types_are_those_of_the_parameters(case, dtype, explicit_mesh, relaxed_jax):
    sharding = jax.sharding.NamedSharding(explicit_mesh, jax.P(None, "x"))
    tx = WRAPPED[case]()
    params = {
        "dense": {
            "kernel": jnp.ones((2, 4), dtype, out_sharding=sharding),
            "bias": jnp.ones((3, 2), dtype, out_sharding=sharding),
        }
    }
    state = tx.init(params)
    kernel = optax.tree.get(state, "average")["dense"]["kernel"]
    assert jax.typeof(kernel).sharding.spec == jax.P(None, "x")
    before = jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, quick_jit(tx.init)(params)) == before
    traced = jax.make_jaxpr(lambda state: tx.update(params, state, params)[1])(state)
    assert list(traced.out_avals) == jax.tree.leaves(before)
    read = jax.eval_shape(averaged_params, state, params)
    assert read["dense"]["kernel"].dtype == dtype
