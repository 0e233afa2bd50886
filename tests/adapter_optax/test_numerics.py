"""Held against float64 and against exact fractions: every rule, every dtype, small and huge counts.

The references weigh the snapshots by the definition of a rule, not by its recurrence.
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_optax import swa
from swa_optax.mixing import mixing_weight

N = 10_000
DTYPES = ("float16", "bfloat16", "float32", "complex64", "float64", "complex128")
RULES = [
    Uniform(),
    EMA(0.9),
    EMA(0.9999),
    EMA(half_life=0.02),  # all but the last one is forgotten
    EMA(half_life=2000),
    EMA(half_life=1e12),  # nothing is
    Polynomial(eta=0.5),
    Polynomial(eta=8),
    Polynomial(eta=1e9),
]


UNIFORM = Uniform()


def every_update(rule=UNIFORM, **rest):
    return SWAConfig(start="1step", every="1step", rule=rule, **rest)


def shares(rule, n):
    """The weights of n snapshots by definition, float64 of sum 1."""
    k = np.arange(1.0, n + 1)
    if isinstance(rule, EMA):
        logs = (n - k) * (
            math.log(rule.decay) if rule.decay is not None else -math.log(2) / rule.half_life
        )
    elif isinstance(rule, Polynomial):
        logs = np.concatenate([[0], np.cumsum(np.log1p(rule.eta / k[:-1]))])
    else:
        logs = np.zeros(n)
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def drifting(n, x64):
    """What n updates store: noise about a point that moves, none of it near 0, in every dtype."""
    rng = np.random.default_rng(0)
    values = 1 + np.linspace(0, 5, n)[:, None] + 0.1 * rng.standard_normal((n, 8))
    snapshots = {}
    for dtype in DTYPES if x64 else DTYPES[:4]:
        complexes = dtype.startswith("complex")
        exact = values + 1j * values[:, ::-1] if complexes else values
        snapshots[dtype] = exact.astype(jnp.dtype(dtype))
    return snapshots


def averaged(rule, snapshots):
    tx = swa(every_update(rule, nonfinite="keep"))

    @jax.jit
    def train(state, snapshots):
        def body(state, params):
            return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1], None

        return jax.lax.scan(body, state, snapshots)[0]

    return train(tx.init(jax.tree.map(lambda leaf: leaf[0], snapshots)), snapshots)


def error(average, exact):
    average = np.asarray(average)
    average = average.astype(np.complex128 if np.iscomplexobj(average) else np.float64)
    return float(np.linalg.norm(average - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ten_thousand_snapshots_in_every_dtype(rule):
    with jax.enable_x64(True):
        check_ten_thousand(rule, drifting(N, x64=True))


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.9999), Polynomial(eta=8)], ids=str)
def test_ten_thousand_snapshots_without_64_bits(rule):
    check_ten_thousand(rule, drifting(N, x64=False))


def check_ten_thousand(rule, snapshots):
    state = averaged(rule, snapshots)
    assert int(state.n_averaged) == N
    for dtype, stored in snapshots.items():
        wide = stored.astype(np.complex128 if dtype.startswith("complex") else np.float64)
        exact = shares(rule, N) @ wide
        assert error(state.average[dtype], exact) <= (
            1e-12 if dtype in ("float64", "complex128") else 2e-6
        ), dtype


def test_the_closed_form_of_ema_does_not_drift_where_the_recurrence_does():
    rule, stored = EMA(0.9999), drifting(N, False)["float32"]
    exact = shares(rule, N) @ stored.astype(np.float64)
    assert error(averaged(rule, {"w": stored}).average["w"], exact) <= 1.1e-6
    total, average = np.float32(0), np.zeros(8, np.float32)
    for snapshot in stored:
        total = np.float32(0.9999) * total + np.float32(1)
        average += (snapshot - average) / total
    assert error(average, exact) > 5e-6


# The mixing weights.


def weights(rule, n):
    return np.asarray(jax.jit(lambda n: mixing_weight(rule, n, jnp.float32))(jnp.asarray(n)))


def test_uniform_weights_are_correctly_rounded_up_to_two_to_the_24():
    rng = np.random.default_rng(0)
    edges = [2**k + d for k in range(1, 24) for d in (-1, 0, 1)] + [2**24 - 1, 2**24]
    n = np.concatenate([np.arange(1, 5000), edges, rng.integers(1, 2**24, 5000)]).astype(np.int32)
    # A quotient of float64 rounded again is the correctly rounded one of float32: 53 >= 2 * 24 + 2.
    np.testing.assert_array_equal(weights(Uniform(), n), (1 / n.astype("f8")).astype("f4"))


def test_beyond_uniform_weights_are_off_by_two_roundings_at_most():
    rng = np.random.default_rng(0)
    n = np.concatenate([rng.integers(2**24, 2**31, 2000), [2**24 + 1, 2**31 - 1]]).astype(np.int32)
    for got, k in zip(weights(Uniform(), n).tolist(), n.tolist(), strict=True):
        # The count is rounded to float32, and then the quotient: 2**-24 each.
        assert abs(Fraction(got) * k - 1) <= Fraction(1, 2**23)
    assert weights(Uniform(), np.int32(2**24 + 1)) == np.float32(2) ** -24  # as of 2**24


@pytest.mark.parametrize("rule", [*RULES, EMA(half_life=1e-9), EMA(half_life=1e300)], ids=str)
def test_weights_of_any_count_are_numbers_between_0_and_1(rule):
    n = np.array([1, 2, 3, 100, 2**24, 2**24 + 1, 2**31 - 1], np.int32)
    got = weights(rule, n)
    assert got[0] == 1
    assert ((got > 0) & (got <= 1)).all()
    assert (np.diff(got) <= 0).all()
    expected = [rule.mixing_weight(float(k)) for k in n]
    np.testing.assert_allclose(got, expected, rtol=5e-7)


def test_the_sixteen_millionth_snapshot_weighs_exactly_what_it_should():
    tx, n = swa(every_update()), 2**24
    params = {"w": jnp.array([2.0**24 + 6, -(2.0**24) + 6, 6.0])}
    state = tx.init(params)._replace(
        n_averaged=jnp.int32(n - 1), average={"w": jnp.array([6.0, 6.0, 6.0])}
    )
    _, state = jax.jit(tx.update)({"w": jnp.zeros(3)}, state, params)
    assert state.average["w"].tolist() == [7, 5, 6]
    assert (int(state.n_averaged), float(state.total)) == (n, n)


# What is averaged: what is stored.


AWKWARD = [-0.0, 0.0, 1 / 3, 1.0, -3.0]


def edges(dtype):
    """Signed zeros, the smallest denormals and normals, the largest number, a third."""
    info = jnp.finfo(dtype)
    floats = [*AWKWARD, float(info.max), float(info.min), float(info.tiny)]
    floats += [float(info.smallest_subnormal), -float(info.smallest_subnormal)]
    return jnp.asarray(np.array(floats, jnp.dtype(dtype)))


@pytest.mark.parametrize("applied", [True, False], ids=["update", "no update"])
def test_the_first_snapshot_is_what_is_stored_to_the_bit(applied, x64):
    tx = swa(every_update())
    params = {dtype: edges(dtype) for dtype in ["float16", "bfloat16", "float32"]}
    params["complex64"] = jax.lax.complex(edges("float32"), edges("float32")[::-1])
    if x64:
        params["float64"] = edges("float64")

    def step(params, state):
        updates = {
            dtype: jnp.full_like(leaf, -0.0) if applied else None for dtype, leaf in params.items()
        }
        _, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, updates) if applied else params), state

    def check(step, before):
        start = jax.tree.map(lambda leaf: jnp.full_like(leaf, before), params)
        stored, state = step(params, tx.init(start))
        assert int(state.n_averaged) == 1
        for dtype, leaf in stored.items():
            wide = np.asarray(leaf).astype(state.average[dtype].dtype)
            assert np.asarray(state.average[dtype]).tobytes() == wide.tobytes(), dtype

    if applied and not x64:
        check(step, 0.0)  # eagerly, too
    compiled = jax.jit(step)
    for before in (0.0, -1e4, np.nan, np.inf):
        check(compiled, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters_are_averaged_as_they_are_stored(dtype, relaxed_jax):
    tx = optax.chain(optax.sgd(1e-2, momentum=0.9), swa(every_update()))

    @jax.jit
    def step(params, state):
        # A gradient of float32: what is stored is the rounded sum.
        grads = jax.tree.map(lambda p: jnp.sin(3 * p.astype(jnp.float32)), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.linspace(0.1, 2, 64).astype(dtype)}
    state, stored, n = tx.init(params), [], 128
    for _ in range(n):
        params, state = step(params, state)
        stored.append(np.asarray(params["w"], np.float64))
    # Sums of 128 numbers with 8 or 11 bits are exact in float64.
    assert error(state[1].average["w"], np.sum(stored, axis=0) / n) <= 5e-7
