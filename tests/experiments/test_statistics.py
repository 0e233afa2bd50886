"""Paired differences against closed forms, and against all sign patterns one by one."""

from itertools import product

import numpy as np
import pytest
from experiments.scores import score
from experiments.statistics import paired
from hypothesis import given, settings
from hypothesis import strategies as st

VALUES = st.lists(st.integers(-50, 50).map(lambda n: n / 8), min_size=2, max_size=8)


@settings(deadline=None)  # scipy is imported in the first
@given(VALUES)
def test_p_is_the_share_of_all_sign_patterns(differences):
    found = paired(differences, [0.0] * len(differences))
    means = [np.dot(signs, differences) for signs in product([-1, 1], repeat=len(differences))]
    expected = np.mean(np.abs(means) >= abs(sum(differences)) - 1e-12)
    assert found.p == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(differences))


@settings(deadline=None)
@given(VALUES, VALUES)
def test_order_of_the_two_turns_the_sign_alone(a, b):
    n = min(len(a), len(b))
    one, other = paired(a[:n], b[:n]), paired(b[:n], a[:n])
    assert (one.mean, one.low, one.p) == pytest.approx((-other.mean, -other.high, other.p))


def test_interval_is_students():
    found = paired([1.0, 2.0, 3.0, 4.0], [0.0] * 4)
    # t(.975, 3) = 3.1824, standard error .6455.
    assert (found.low, found.high) == pytest.approx((2.5 - 2.0543, 2.5 + 2.0543), abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_what_is_no_pairs_is_refused(a, b):
    with pytest.raises(ValueError, match="pairs are needed"):
        paired(a, b)


def test_calibration_error_of_known_predictions():
    # 60 % sure, right half of the time; 90 % sure, always right.
    p = [[0.6, 0.4]] * 10 + [[0.9, 0.1]] * 10
    labels = np.array([0] * 5 + [1] * 5 + [0] * 10)
    assert score(np.log(p), labels).ece == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.1))
