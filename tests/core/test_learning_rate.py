from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import LRSchedule, learning_rate

SCHEDULES = {
    "constant": LRSchedule(10, 0.05),
    "linear": LRSchedule(10, 0.05, 8, "linear"),
    "cosine": LRSchedule(10, 0.05, 8, "cosine"),
    "one step": LRSchedule(10, 0.05, 1),
    "upwards": LRSchedule(10, 0.7, 30, "cosine"),
    "cyclical": LRSchedule(10, 0.05, cycle=4, low=0.01),
    "each update low": LRSchedule(10, 0.05, cycle=1, low=0.01),
    "from the beginning": LRSchedule(0, 0.05, 5, "linear"),
    "long": LRSchedule(20_000_000, 0.05, 3_000_000, "cosine"),
}


def reference(update, base, lr):
    """The rate, case by case, from the papers' formulas on Python floats."""
    i = update - lr.start
    if i <= 0:
        return base
    if lr.cycle is not None:
        t = ((i - 1) % lr.cycle + 1) / lr.cycle
        return (1 - t) * lr.value + t * lr.low
    if i >= lr.anneal:
        return lr.value
    t = i / lr.anneal
    if lr.shape == "cosine":
        return lr.value + (base - lr.value) * (1 + math.cos(math.pi * t)) / 2
    return (1 - t) * base + t * lr.value


def updates_of(lr):
    around = np.arange(-12, 60) + lr.start
    over = lr.start + np.linspace(0, 2 * lr.anneal, 50).astype(int)
    return np.unique(np.concatenate([around, over]).clip(1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("base", [0.1, 0.05, 1e-4])
def test_equals_the_reference(name, base):
    lr = SCHEDULES[name]
    updates = updates_of(lr)
    expected = [reference(int(update), base, lr) for update in updates]
    np.testing.assert_allclose(learning_rate(updates, base, lr), expected, rtol=1e-12)
    one_by_one = [float(learning_rate(int(update), base, lr)) for update in updates]
    assert one_by_one == learning_rate(updates, base, lr).tolist()


@given(
    st.integers(0, 10**6),
    st.floats(1e-6, 10),
    st.floats(1e-6, 10),
    st.integers(0, 10**6),
    st.sampled_from(["cosine", "linear"]),
)
def test_the_ends_are_exact_and_the_way_between_them_monotone(start, base, value, anneal, shape):
    lr = LRSchedule(start, value, anneal, shape)

    def rate(update):
        return float(learning_rate(update, base, lr))

    assert rate(start) == base
    assert rate(max(1, start // 2)) == base or start == 0
    assert rate(start + max(anneal, 1)) == value
    assert rate(start + anneal + 10**6) == value
    way = learning_rate(start + np.linspace(0, anneal + 1, 30).astype(int), base, lr)
    steps = np.diff(way) * np.sign(value - base)
    assert (steps >= -1e-12).all()
    if anneal > 1 and base != value and 1 / anneal**2 > 1e-6:
        assert rate(start + 1) != base or abs(value - base) < 1e-9  # it departs at once


def test_departs_at_the_update_after_the_start():
    lr = LRSchedule(10, 0.05, 4, "linear")
    rates = [float(learning_rate(update, 0.1, lr)) for update in (1, 9, 10, 11, 13, 14, 15)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.0875, 0.0625, 0.05, 0.05])
    assert float(learning_rate(11, 0.1, LRSchedule(10, 0.05))) == 0.05


@given(st.integers(0, 10**4), st.integers(1, 500), st.floats(0.01, 10), st.floats(0.001, 1))
def test_cycles_end_exactly_on_low(start, cycle, value, share):
    lr = LRSchedule(start, value, cycle=cycle, low=value * share)
    ends = start + cycle * np.arange(1, 50)
    assert (learning_rate(ends, 0.3, lr) == lr.low).all()
    if start:
        assert learning_rate(start, 0.3, lr) == 0.3
    first = learning_rate(ends[:-1] + 1, 0.3, lr)
    np.testing.assert_allclose(first, value + (lr.low - value) / cycle, rtol=1e-12)
    within = learning_rate(start + np.arange(1, cycle + 1), 0.3, lr)
    assert (np.diff(within) <= 0).all()


def test_the_cycle_of_the_paper():
    # a(i) = (1 - t) a1 + t a2 with t = (mod(i - 1, c) + 1) / c, eq. in sec. 3.1.
    rates = learning_rate(np.arange(1, 9), 0.1, LRSchedule(0, 0.05, cycle=4, low=0.01))
    assert rates.tolist() == pytest.approx([0.04, 0.03, 0.02, 0.01] * 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_jax_traces_it_under_strict_promotion_and_equals_numpy(jax_strict, name):
    jnp, lr = jax_strict.numpy, SCHEDULES[name]
    updates = updates_of(lr)
    traces = []

    @jax_strict.jit
    def rate(update, base):
        traces.append(update)
        return learning_rate(update, base, lr, xp=jnp)

    exact = learning_rate(updates, 0.1, lr)
    got = rate(jnp.asarray(updates, jnp.int32), jnp.float32(0.1))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), exact, rtol=5e-7)
    scalars = [rate(jnp.int32(update), jnp.float32(0.1)) for update in updates[:30]]
    assert len(traces) == 2  # one for each shape
    np.testing.assert_allclose(scalars, exact[:30], rtol=5e-7)
    # A Python float as base, which is how optax' schedules often begin.
    weak = jax_strict.jit(lambda update: learning_rate(update, 0.1, lr, xp=jnp))
    np.testing.assert_allclose(weak(jnp.int32(updates[-1])), exact[-1], rtol=5e-7)


def test_the_ends_are_exact_in_float32_too(jax_strict):
    jnp = jax_strict.numpy
    for lr in (LRSchedule(10, 0.05, 7, "cosine"), LRSchedule(10, 0.05, cycle=7, low=0.013)):
        end = lr.value if lr.cycle is None else lr.low
        rate = jax_strict.jit(lambda update, lr=lr: learning_rate(update, 0.3, lr, xp=jnp))
        assert rate(jnp.int32(10)) == np.float32(0.3)
        # The compiler makes 7 * (1 / 7) of 7 / 7, which is not 1 in float32.
        assert rate(jnp.int32(17)) == np.float32(end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_shapes_and_bases(name):
    lr = SCHEDULES[name]
    assert np.shape(learning_rate(5, 0.1, lr)) == ()
    assert learning_rate(np.ones((2, 3), int), 0.1, lr).shape == (2, 3)
    groups = learning_rate(lr.start + 2, np.array([0.1, 0.2]), lr)
    expected = [reference(lr.start + 2, base, lr) for base in (0.1, 0.2)]
    np.testing.assert_allclose(groups, expected, rtol=1e-12)
