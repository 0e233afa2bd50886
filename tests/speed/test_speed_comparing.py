"""A change is one that is beyond the noise of both runs, and large."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speed.comparing import LARGE, changed, compare
from speed.joining import Entry, Ratio

OURS, PEER = "swa_torch", "torch-ema"


def entry(ratio, who=OURS, part="torch"):
    return Entry(part, "snapshot", "resnet50", who, "C loop", Ratio(*ratio))


STEADY = (0.98, 1.0, 1.02)


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (STEADY, 0),
        ((1.18, 1.2, 1.22), 1),
        ((0.78, 0.8, 0.82), -1),
        ((1.12, 1.14, 1.16), 0),  # apart, but less than 15 %
        ((0.9, 1.5, 2.0), 0),  # more than 15 %, but not apart
        ((1.02, 1.5, 2.0), 0),  # ranges that touch
        ((1.03, 1.5, 2.0), 1),
        ((0.2, 0.5, 0.99), 0),
        ((0.2, 0.5, 0.97), -1),
    ],
)
def test_what_counts_as_a_change(new, found):
    assert changed(Ratio(*STEADY), Ratio(*new)) == found


RATIOS = st.lists(st.floats(0.01, 100), min_size=3, max_size=3).map(lambda v: Ratio(*sorted(v)))


@given(RATIOS)
def test_nothing_changed_against_itself(ratio):
    assert changed(ratio, ratio) == 0


@given(RATIOS, RATIOS)
def test_turned_around_a_regression_is_an_improvement(old, new):
    assert changed(old, new) == -changed(new, old)


@given(RATIOS, RATIOS)
def test_whatever_is_named_is_apart_and_large(old, new):
    if changed(old, new) == 1:
        assert new.low > old.high
        assert new.median / old.median > 1 + LARGE


def test_ours_are_named_and_others_apart():
    slower, faster = (1.4, 1.5, 1.6), (0.4, 0.5, 0.6)
    old = [entry(STEADY), entry(STEADY, PEER), entry(STEADY, "swa_keras")]
    new = [entry(slower), entry(slower, PEER), entry(faster, "swa_keras")]
    found = compare("old.json", old, new)
    assert found.compared == 3
    assert [change.who for change in found.regressions] == [OURS]
    assert [change.who for change in found.improvements] == ["swa_keras"]
    assert [change.who for change in found.others] == [PEER]
    assert "1.00 (0.98-1.02) -> 1.50 (1.40-1.60), x 1.50" in found.regressions[0].text()


def test_memory_has_no_rounds_but_a_least_difference():
    def against(after):
        key = f"torch | {OURS} | peak"
        return compare("old.json", [], [], ({key: 0.01}, {key: after}))

    assert against(0.09).regressions == []  # nine times as much of next to nothing
    (change,) = against(1.01).regressions
    assert change.text() == f"torch | {OURS} | peak [copies]: 0.01 -> 1.01"


def test_what_only_one_run_has_is_said_of_the_parts_that_ran():
    old = [entry(STEADY), entry(STEADY, part="optax"), entry(STEADY, "gone")]
    new = [entry(STEADY), entry(STEADY, "new")]
    found = compare("old.json", old, new, parts=["torch"])
    assert found.compared == 1
    assert found.gone == ["torch | snapshot | resnet50 | gone | C loop"]
    assert found.added == ["torch | snapshot | resnet50 | new | C loop"]
