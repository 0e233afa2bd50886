"""The conformance kit is itself tested: each check rejects a driver that is wrong in its way."""

from __future__ import annotations

import inspect
from typing import ClassVar

import numpy as np
import pytest
from kit import broken_drivers as broken

from swa_core import Schedule, SWAConfig
from swa_core.testing import (
    CHECKS,
    ConformanceError,
    CoreDriver,
    check_adapter,
    checks_of,
    parametrize_with_checks,
    scripts,
)

# Each broken driver, with all the checks that reject it. Where there are several, the same
# mistake really shows in each.
REJECTED_BY = {
    broken.IgnoresStop: {"snapshots_on_schedule"},
    broken.RoundsTheLastBit: {"average_equals_core"},
    broken.Float32Recurrence: {"average_stays_precise"},
    broken.LerpsFromTheStart: {"first_snapshot_is_a_copy"},
    broken.HandsOutItsArrays: {"average_shares_no_memory"},
    broken.ForgetsToRestoreOnARaise: {"swap_restores"},
    broken.StoresOverTheWeights: {"swap_restores"},
    broken.WarnsEveryTime: {"live_weights_before_the_first_snapshot"},
    broken.ReadsZerosAtFirst: {"live_weights_before_the_first_snapshot"},
    broken.FinalizesNothing: {"finalize_keeps_the_average"},
    broken.FinalizesTheStart: {"finalize_before_the_first_snapshot_is_refused"},
    broken.TrainsTheAverage: {"update_while_swapped_is_refused"},
    broken.LosesItsTotal: {"resume_is_exact"},
    broken.LosesItsClock: {"resume_is_exact", "state_saved_while_swapped"},
    broken.SavesTheSwappedWeights: {"state_saved_while_swapped"},
    broken.AveragesInHalf: {"half_precision_averages_in_float32"},
    broken.AveragesIntegers: {"integers_are_left_alone"},
    broken.AveragesTiedTwice: {"tied_weights_are_averaged_once"},
    broken.AveragesFrozen: {"frozen_weights_are_left_alone"},
    broken.TakesAnyShape: {"changed_shape_is_refused"},
    broken.TakesAnyDtype: {"changed_dtype_is_refused"},
    broken.TakesAnyNumber: {"changed_number_is_refused"},
    broken.SkipsSilently: {"nonfinite_snapshot_is_skipped"},
    broken.CountsUpdatesWithNaN: {"nonfinite_snapshot_is_skipped"},
    broken.NeverKeepsNaN: {"nonfinite_is_kept_on_request"},
}

# Mistakes that spoil much at once, with checks that must be among those that reject them.
COARSE = {
    broken.AliasesTheWeights: {"average_shares_no_memory"},
    broken.AveragesNaN: {"nonfinite_snapshot_is_skipped"},
    broken.CountsFromZero: {"snapshots_on_schedule", "average_equals_core"},
    broken.CountsWhatItRefuses: {
        "changed_shape_is_refused",
        "changed_dtype_is_refused",
        "changed_number_is_refused",
    },
    broken.Garbage: {"average_equals_core", "average_stays_precise", "swap_restores"},
}


def rejecting(make):
    """The names of the checks that reject a driver."""
    names = set()
    for name, run, _ in checks_of(make):
        # 10 000 snapshots take seconds, and drift shows in no other driver's.
        short = name == "average_stays_precise" and make is not broken.Float32Recurrence
        try:
            run(n_snapshots=100) if short else run()
        except Exception:
            names.add(name)
    return names


@parametrize_with_checks([CoreDriver])
def test_reference_passes(check):
    check()


@pytest.mark.parametrize("driver", REJECTED_BY, ids=lambda driver: driver.__name__)
def test_broken_driver_is_rejected_by_its_check_and_no_other(driver):
    assert rejecting(driver) == REJECTED_BY[driver]


@pytest.mark.parametrize("driver", COARSE, ids=lambda driver: driver.__name__)
def test_coarser_mistakes_are_rejected_too(driver):
    assert rejecting(driver) >= COARSE[driver]


def test_every_check_has_its_broken_driver():
    alone = {next(iter(names)) for names in REJECTED_BY.values() if len(names) == 1}
    assert alone == set(CHECKS)


def test_every_broken_driver_is_tried():
    written = {
        driver
        for driver in vars(broken).values()
        if inspect.isclass(driver) and issubclass(driver, CoreDriver) and driver is not CoreDriver
    }
    assert written == REJECTED_BY.keys() | COARSE.keys()


def test_check_adapter_lists_every_failure_at_the_end():
    with pytest.raises(ConformanceError) as raised:
        check_adapter(broken.Garbage)
    text = str(raised.value)
    assert f"of {len(CHECKS)} checks failed" in text
    assert "average_equals_core: FAILED: the average by" in text
    assert "swap_restores: FAILED: the weights inside averaged()" in text


def test_what_a_driver_itself_raises_is_named_and_is_the_cause():
    class Unfinished(CoreDriver):
        def n_averaged(self):
            raise KeyError("updates")

    with pytest.raises(ConformanceError, match="FAILED: KeyError: 'updates'") as raised:
        check_adapter(Unfinished)
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_method_that_is_not_written_is_told_from_a_wrong_average():
    class Unfinished(CoreDriver):
        def average(self):
            return None

    with pytest.raises(ConformanceError, match="the driver gave None, expected a dict"):
        check_adapter(Unfinished)


def test_an_expected_failure_needs_to_fail():
    class Pessimist(CoreDriver):
        expected_failures: ClassVar = {"resume_is_exact": "never tried"}

    with pytest.raises(ConformanceError, match="it passes, though expected to fail"):
        check_adapter(Pessimist)


def test_an_expected_failure_is_accepted_with_its_reason():
    class Honest(broken.TakesAnyShape):
        expected_failures: ClassVar = {"changed_shape_is_refused": "shapes are checked elsewhere"}

    results = {result.name: result for result in check_adapter(Honest)}
    assert "shapes are checked elsewhere" in str(results["changed_shape_is_refused"])


def test_an_expected_failure_of_no_check_is_an_error():
    class Misspelt(CoreDriver):
        expected_failures: ClassVar = {"resume_is_exct": "a typing error"}

    with pytest.raises(ValueError, match="resume_is_exct"):
        check_adapter(Misspelt)


@pytest.mark.parametrize("rule", scripts.EXACT_RULES, ids=str)
def test_exact_scripts_move_by_whole_numbers(rule):
    driver, moved = CoreDriver(), 0
    driver.start(scripts.whole(0), SWAConfig(start="3step", every="2step", rule=rule))
    for weights in scripts.exact(rule, Schedule(3, 2), 11):
        driver.train(weights)
        if driver.n_averaged():
            average = driver.average()
            assert all((leaf == np.round(leaf)).all() for leaf in average.values())
            moved += any((average[name] != weights[name]).any() for name in average)
    assert moved > 3
