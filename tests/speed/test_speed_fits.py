"""Fits of known curves give what the curves were made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from speed.fits import exponent, per_tensor
from speed.growth import curves, left_out

SIZES = [1e6, 3e6, 1e7, 3e7, 1e8]


@given(st.floats(-2, 3), st.floats(1e-9, 1e3))
def test_the_exponent_of_a_power_is_found(power, factor):
    found = exponent(SIZES, [factor * size**power for size in SIZES])
    assert found.value == pytest.approx(power, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-7)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_exponent_does_not_depend_on_the_units(of_size, of_seconds):
    seconds = [1.0, 2.5, 10.0, 31.0, 90.0]
    one = exponent(SIZES, seconds)
    other = exponent([of_size * s for s in SIZES], [of_seconds * t for t in seconds])
    assert (one.value, one.error) == pytest.approx((other.value, other.error))


def test_the_error_of_the_exponent_is_that_of_the_books():
    # y = x + (1, -1, -1, 1) / 10 in logarithms: the residuals are no line, so the slope is 1.
    x = np.array([-1.5, -0.5, 0.5, 1.5])
    residuals = np.array([0.1, -0.1, -0.1, 0.1])
    found = exponent(np.exp(x), np.exp(x + residuals))
    assert found.value == pytest.approx(1.0)
    assert found.error == pytest.approx(math.sqrt((residuals @ residuals) / 2 / (x @ x)))


@given(st.floats(1e-5, 1e-2), st.floats(0.1, 300))
def test_a_line_gives_microseconds_for_each_tensor(start, each):
    counts = [10, 100, 1000, 10_000]
    found = per_tensor(counts, [start + 1e-6 * each * n for n in counts])
    assert found.value == pytest.approx(each, rel=1e-4)


def test_few_tensors_count_as_much_as_many():
    # Ten per cent more at the largest: a fit of absolute residuals would follow it alone.
    counts = [10, 30, 100, 300, 1000, 10_000]
    seconds = [1e-6 * n for n in counts]
    seconds[-1] *= 1.1
    assert 1.0 < per_tensor(counts, seconds).value < 1.05


def test_a_line_and_its_error_are_those_of_scipy():
    counts = np.array([10, 30, 100, 300, 1000])
    seconds = (1e-4 + 3e-6 * counts) * [1.02, 0.97, 1.05, 0.95, 1.01]
    value, covariance = optimize.curve_fit(
        lambda n, a, b: a + b * n / 1e6, counts, seconds, p0=(1e-4, 3.0), sigma=seconds
    )
    found = per_tensor(counts, seconds)
    assert found.value == pytest.approx(value[1], rel=1e-4)
    assert found.error == pytest.approx(math.sqrt(covariance[1, 1]), rel=1e-3)


def test_two_points_are_too_few():
    assert exponent([1, 2], [1, 2]) is None
    assert per_tensor([1, 2], [1, 2]) is None


def grown(rounds_of):
    return [
        {
            "grows": "tensors",
            "fixed": 10,
            "left_out": {"10000": "it is ill"},
            "tables": [
                {"size": n, "rows": {"ours": {"rounds": rounds_of(n)}}, "absent": {"it": "ill"}}
                for n in (10, 100, 1000)
            ],
        }
    ]


def test_a_curve_is_made_of_the_medians_of_its_rounds():
    # The mean of these rounds grows as the square.
    (curve,) = curves("optax", grown(lambda n: [1e-6 * n, 1e-6 * n, 1e-6 * n * n]))
    assert curve.sizes == [10, 100, 1000]
    assert [middle for _, middle, _ in curve.seconds] == pytest.approx([1e-5, 1e-4, 1e-3])
    assert curve.exponent.value == pytest.approx(1.0)
    assert curve.per_tensor.value == pytest.approx(1.0)


def test_what_growth_left_out_is_said():
    axes = grown(lambda n: [1.0, 1.0, 1.0])
    axes[0]["tables"][2]["absent"]["other"] = "no memory"
    assert left_out("optax", axes) == [
        "optax: 10000 tensors it is ill",
        "optax, tensors: it: ill",
        "optax, 1000 tensors: other: no memory",
    ]
