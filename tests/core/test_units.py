from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core.numeric import number
from swa_core.units import MissingLengthError, Time

FORMS = 'Say "160ep" (epochs), "160step" (updates) or a share such as "75%".'


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("75%", 75, "%"),
        ("0%", 0, "%"),
        ("100%", 100, "%"),
        (".5%", Fraction(1, 2), "%"),
        ("160ep", 160, "ep"),
        ("160 epochs", 160, "ep"),
        ("1 Epoch", 1, "ep"),
        ("0.1ep", Fraction(1, 10), "ep"),
        ("2.ep", 2, "ep"),
        ("30000step", 30000, "step"),
        ("30000 STEPS", 30000, "step"),
        ("8.0step", 8, "step"),
        ("  007 step\n", 7, "step"),
    ],
)
def test_reads_what_people_write(text, value, unit):
    assert Time.parse(text) == (value, unit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            160,
            '160 has no unit. Say "160ep" (epochs), "160step" (updates) or a share such as "75%".',
        ),
        ("160", '"160" has no unit. Say "160ep" (epochs), "160step" (updates) or a share such as'),
        (np.int64(160), '160 has no unit. Say "160ep"'),
        (0.75, '0.75 has no unit. Say "0.75ep" (epochs) or a share such as "75%".'),
        ("12.5", '"12.5" has no unit. Say "12.5ep" (epochs) or a share such as "75%".'),
        (-5, f"cannot read -5 as a time. {FORMS}"),
        ("-5ep", f"cannot read '-5ep' as a time. {FORMS}"),
        (math.nan, f"cannot read nan as a time. {FORMS}"),
        (math.inf, "inf is longer than any training."),
        (1e-7, f"cannot read 1e-07 as a time. {FORMS}"),
        ("", f"cannot read '' as a time. {FORMS}"),
        ("ep", f"cannot read 'ep' as a time. {FORMS}"),
        ("1e3step", "cannot read '1e3step' as a time"),
        ("1_000step", "cannot read '1_000step' as a time"),
        ("1,5ep", "cannot read '1,5ep' as a time"),
        ("75 percent of it", "cannot read"),
        ("nan%", "cannot read"),
        ("\u0663ep", "cannot read"),  # a digit, but not one that everybody reads
        ("5 minutes", f"unknown unit \"minutes\" in '5 minutes'. {FORMS}"),
        ("5%%", 'unknown unit "%%"'),
        ("10.5step", "'10.5step' is not a whole number of updates. Round it."),
        ("101%", "'101%' is more than the whole training. Say \"100%\" or less."),
        ("100.0000000000000000001%", "is more than the whole training"),
        ("9" * 5000 + "step", "99999999999999999999... is longer than any training."),
        ("9" * 17 + "ep", "is longer than any training"),
        pytest.param(10**400, "inf is longer than any training.", id="huge"),
        (10**18, "1e+18 is longer than any training."),
        (True, f"expected a time, got True. {FORMS}"),
        (np.True_, "expected a time, got"),
        (None, f"expected a time, got None. {FORMS}"),
        (["75%"], "expected a time, got ['75%']"),
        (b"75%", "expected a time, got b'75%'"),
        (Fraction(1, 2), "expected a time, got"),
    ],
)
def test_says_what_to_write_instead(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is tested
        Time.parse(text)
    assert str(caught.value).startswith(message) or message in str(caught.value)


@given(st.text() | st.integers() | st.floats() | st.none() | st.binary())
def test_anything_is_a_time_or_a_value_error(text):
    try:
        time = Time.parse(text)
    except ValueError:
        return
    assert isinstance(text, str)
    assert time.value >= 0


@pytest.mark.parametrize(
    ("text", "total", "updates"),
    [
        ("7%", 100, 7),
        ("29%", 100, 29),
        ("57%", 100, 57),
        ("0.1%", 1000, 1),
        ("16.1%", 1000, 161),  # 16.1 * 1000 / 100 is 161.00000000000003
        ("32.7%", 2000, 654),
    ],
)
def test_a_share_is_exact_where_a_float_is_not(text, total, updates):
    assert Time.parse(text).updates(total_steps=total) == updates


@given(st.decimals(0, 100, places=6), st.integers(1, 10**9))
def test_a_share_is_rounded_up(share, total):
    updates = Time.parse(f"{share:f}%").updates(total_steps=total)
    exact = Fraction(share) * total / 100
    assert exact <= updates < exact + 1


@given(st.decimals(0, 10**6, places=3), st.integers(1, 10**6))
def test_epochs_are_rounded_up_to_a_whole_update(epochs, steps_per_epoch):
    updates = Time.parse(f"{epochs:f}ep").updates(steps_per_epoch=steps_per_epoch)
    exact = Fraction(epochs) * steps_per_epoch
    assert exact <= updates < exact + 1


@given(st.decimals(0, 100, places=3), st.integers(1, 1000), st.integers(1, 10**6))
def test_a_share_in_whole_epochs_is_rounded_up_once(share, steps_per_epoch, total):
    updates = Time.parse(f"{share:f}%").updates(
        steps_per_epoch=steps_per_epoch, total_steps=total, whole_epochs=True
    )
    exact = Fraction(share) * total / 100
    assert updates % steps_per_epoch == 0
    assert exact <= updates < exact + steps_per_epoch


def test_a_share_that_is_a_whole_epoch_stays_there():
    # 75 % of 20 epochs is epoch 15, though .75 * 20 * 391 in floats could be a little more.
    time = Time.parse("75%")
    assert time.updates(steps_per_epoch=391, total_steps=20 * 391, whole_epochs=True) == 15 * 391


def test_whole_epochs_concern_shares_only():
    lengths = {"steps_per_epoch": 10, "total_steps": 100, "whole_epochs": True}
    assert Time.parse("3step").updates(**lengths) == 3
    assert Time.parse("0.5ep").updates(**lengths) == 5


@pytest.mark.parametrize(
    ("text", "lengths", "named"),
    [
        ("75%", {}, "total_steps"),
        ("75%", {"steps_per_epoch": 10}, "total_steps"),
        ("75%", {"total_steps": 10, "whole_epochs": True}, "steps_per_epoch"),
        ("2ep", {}, "steps_per_epoch"),
        ("2ep", {"total_steps": 10}, "steps_per_epoch"),
    ],
)
def test_a_missing_length_is_named(text, lengths, named):
    with pytest.raises(MissingLengthError, match=f"so {named} is needed"):
        Time.parse(text).updates(**lengths)


def test_steps_need_no_length():
    assert Time.parse("30000step").updates() == 30000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.int8(-3), -3.0),
        pytest.param(10**400, math.inf, id="huge"),
        pytest.param(-(10**400), -math.inf, id="minus huge"),
        (True, None),
        (np.True_, None),
        ("3", None),
        (None, None),
        (1j, None),
        (np.ones(1), None),
    ],
)
def test_number(value, expected):
    assert number(value) == expected
    assert type(number(value)) in (float, type(None))
