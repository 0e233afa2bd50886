"""The named checks: what holds in every adapter (numbered as in ``swa_core.testing``)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from swa_core.config import SWAConfig
from swa_core.errors import NothingAveragedError, StructureError, SWAError, SwappedError, SWAWarning
from swa_core.rules import EMA, Polynomial, Uniform
from swa_core.schedule import Schedule
from swa_core.testing import scripts
from swa_core.testing.comparing import ConformanceError, close, require, same_bits
from swa_core.testing.driver import Driver, Weights
from swa_core.testing.reference import CoreDriver

MakeDriver = Callable[[], Driver]
Check = Callable[[MakeDriver], None]

# Updates 2, 4, 6, ...: every other one is a snapshot, and the first is none.
EVERY_OTHER = SWAConfig(start="2step", every="2step")


def check_snapshots_on_schedule(make: MakeDriver) -> None:
    """(1) After every update, n_averaged is the number of snapshots that the schedule gives."""
    cases: tuple[tuple[SWAConfig, dict[str, Any]], ...] = (
        (SWAConfig(start="10step", every="4step"), {}),
        (SWAConfig(start="0step", every="3step", stop="9step"), {}),
        (SWAConfig(start="50%", every="1ep"), {"steps_per_epoch": 3, "total_steps": 20}),
        (SWAConfig(start="2ep", every="1step", stop="3ep"), {"steps_per_epoch": 3}),
    )
    for config, lengths in cases:
        driver, schedule = make(), config.schedule(**lengths)
        driver.start(scripts.whole(0), config, **lengths)
        for update in range(1, 21):
            driver.train(scripts.whole(update))
            due, taken = schedule.n_snapshots(update), driver.n_averaged()
            require(
                taken == due, f"{schedule}: {taken} snapshots after update {update}, expected {due}"
            )


def check_average_equals_core(make: MakeDriver) -> None:
    """(2) On scripts that every rounding agrees on, the average is the core's, bit for bit."""
    for rule in scripts.EXACT_RULES:
        config = SWAConfig(start="3step", every="2step", rule=rule)
        driver, core = _pair(make, scripts.whole(0), config)
        for weights in scripts.exact(rule, Schedule(3, 2), 11):
            _train(driver, weights)
            core.train(weights)
            if core.n_averaged() and driver.n_averaged() == core.n_averaged():
                same_bits(driver.average(), core.average(), f"the average by {rule}")
        require(driver.n_averaged() > 0, "no snapshot was taken")


def check_average_stays_precise(make: MakeDriver, *, n_snapshots: int = 10_000) -> None:
    """(2) After 10 000 snapshots the average is within 2e-6 of a float64 one, by every rule."""
    for rule in (Uniform(), EMA(0.9999), Polynomial(eta=8)):
        driver = make()
        driver.start(scripts.whole(0), SWAConfig(start="1step", every="1step", rule=rule))
        expected: dict[str, np.ndarray] = {}
        for n, weights in enumerate(scripts.noisy(n_snapshots), start=1):
            driver.train(weights)
            share = rule.mixing_weight(float(n))
            for name, new in weights.items():
                before = expected.get(name, np.zeros(new.shape))
                expected[name] = before + share * (new.astype(np.float64) - before)
        close(driver.average(), expected, 2e-6, f"the average by {rule}")


def check_first_snapshot_is_a_copy(make: MakeDriver) -> None:
    """(3) The first snapshot is a bit-exact copy, whatever the weights were before."""
    awkward = np.array([-0.0, 0.0, 1 / 3, 1e-30, -1e30, 16777217.0], np.float32)
    first = {"w": awkward, "v": np.array(-0.0, np.float32)}
    driver = make()
    driver.start({"w": np.full_like(awkward, 3e37), "v": np.array(7, np.float32)}, EVERY_OTHER)
    _train(driver, {"w": np.full_like(awkward, -1e35), "v": np.array(5, np.float32)})
    _train(driver, first)
    same_bits(driver.average(), first, "the first snapshot")


def check_average_shares_no_memory(make: MakeDriver) -> None:
    """(3) Training on changes neither the average nor what was read of it before a snapshot."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    for update in (1, 2):
        _train(driver, scripts.whole(update))
    before = driver.average()
    kept = {name: leaf.copy() for name, leaf in before.items()}
    _train(driver, scripts.whole(3))
    same_bits(driver.average(), kept, "the average after an update that is no snapshot")
    with driver.averaged():
        pass
    _train(driver, scripts.exact(Uniform(), Schedule(2, 2), 4)[3])
    _train(driver, scripts.whole(5))
    same_bits(before, kept, "an average that was read earlier")


def check_swap_restores(make: MakeDriver) -> None:
    """(5) averaged() lends the model the average; after it, and after a raise, it has its own."""
    driver = _averaged_some(make)
    live, average, number = driver.weights(), driver.average(), driver.n_averaged()
    for error in (None, ValueError, KeyboardInterrupt):
        with _expecting(error), driver.averaged():
            same_bits(driver.weights(), average, "the weights inside averaged()")
            if error is not None:
                raise error("raised inside averaged()")
        how = f"after {error.__name__}" if error else "after averaged()"
        same_bits(driver.weights(), live, f"the weights {how}")
        same_bits(driver.average(), average, f"the average {how}")
        require(driver.n_averaged() == number, f"n_averaged changed {how}")
    _train(driver, scripts.whole(9))


def check_live_weights_before_the_first_snapshot(make: MakeDriver) -> None:
    """(5) With nothing averaged, reading and swapping in give the live weights and warn once."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    _train(driver, scripts.whole(1))
    live = driver.weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            same_bits(driver.average(), live, "what is read before the first snapshot")
            with driver.averaged():
                same_bits(driver.weights(), live, "the weights swapped in before it")
    same_bits(driver.weights(), live, "the weights after averaged() before it")
    number = sum(issubclass(warning.category, SWAWarning) for warning in caught)
    require(number == 1, f"{number} SWAWarnings before the first snapshot, expected 1")


def check_finalize_keeps_the_average(make: MakeDriver) -> None:
    """(5) After finalize() the model's weights are the average."""
    driver = _averaged_some(make)
    average = driver.average()
    driver.finalize()
    same_bits(driver.weights(), average, "the weights after finalize()")


def check_finalize_before_the_first_snapshot_is_refused(make: MakeDriver) -> None:
    """(5) finalize() with nothing averaged raises NothingAveragedError and changes nothing."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    _train(driver, scripts.whole(1))
    live = driver.weights()
    with _refused(NothingAveragedError, "finalize() before the first snapshot"):
        driver.finalize()
    same_bits(driver.weights(), live, "the weights after the refused finalize()")


def check_update_while_swapped_is_refused(make: MakeDriver) -> None:
    """(5) An update inside averaged() raises SwappedError and loses nothing."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    for update in (1, 2, 3):
        _train(driver, scripts.whole(update))
    live, average = driver.weights(), driver.average()
    with driver.averaged(), _refused(SwappedError, "an update inside averaged()"):
        driver.train(scripts.whole(4))
    same_bits(driver.weights(), live, "the weights after the refused update")
    same_bits(driver.average(), average, "the average after the refused update")
    _train(driver, scripts.whole(4))
    require(driver.n_averaged() == 2, "the refused update was counted")


def check_resume_is_exact(make: MakeDriver) -> None:
    """(6) Interrupted at any update and resumed, a run equals the uninterrupted one bit for bit."""
    for rule in (Uniform(), EMA(0.9), Polynomial(eta=3)):
        config = SWAConfig(start="3step", every="2step", rule=rule)
        script = list(scripts.noisy(9))
        script[4] = {name: np.full_like(leaf, np.nan) for name, leaf in script[4].items()}
        whole_run = make()
        whole_run.start(scripts.whole(0), config)
        for weights in script:
            _train(whole_run, weights)
        for interruption in range(len(script)):
            before, after = make(), make()
            before.start(scripts.whole(0), config)
            for weights in script[:interruption]:
                _train(before, weights)
            saved = before.save()
            for weights in script[interruption:]:
                _train(before, weights)  # the saved state must share nothing with the run
            after.start(scripts.whole(1), config)
            after.load(saved)
            for weights in script[interruption:]:
                _train(after, weights)
            _same_run(after, whole_run, f"resumed at update {interruption} by {rule}")


def check_state_saved_while_swapped(make: MakeDriver) -> None:
    """(6) A state saved inside averaged() restores the live weights, and the run goes on."""
    script = list(scripts.noisy(8))
    uninterrupted, before, after = make(), make(), make()
    for driver in (uninterrupted, before):
        driver.start(scripts.whole(0), EVERY_OTHER)
        for weights in script[:5]:
            _train(driver, weights)
    with before.averaged():
        saved = before.save()
    after.start(scripts.whole(1), EVERY_OTHER)
    after.load(saved)
    _same_run(after, uninterrupted, "saved while swapped in, then loaded")
    for weights in script[5:]:
        _train(after, weights)
        _train(uninterrupted, weights)
    _same_run(after, uninterrupted, "saved while swapped in, then resumed")


def check_half_precision_averages_in_float32(make: MakeDriver) -> None:
    """(7) The average of float16 weights is float32, and rounded when swapped in.

    Likewise of bfloat16, where ``ml_dtypes`` is installed: numpy knows it only through that.
    """
    for dtype in ("float16", *(["bfloat16"] if importlib.util.find_spec("ml_dtypes") else [])):
        kind = _dtype(dtype)
        driver = make()
        driver.start({"w": np.full(3, 100, kind)}, SWAConfig(start="1step", every="1step"))
        for value in (128, 128, 128, 129):  # the mean, 128.25, is no bfloat16
            _train(driver, {"w": np.asarray([value, 1, 2]).astype(kind)})
        expected = {"w": np.array([128.25, 1, 2], np.float32)}
        same_bits(driver.average(), expected, f"the average of {dtype} weights")
        with driver.averaged():
            rounded = {"w": expected["w"].astype(kind)}
            same_bits(driver.weights(), rounded, f"the {dtype} weights inside averaged()")


def check_integers_are_left_alone(make: MakeDriver) -> None:
    """(7) Integer and boolean leaves are never averaged, and stay the live ones when swapped."""
    driver = make()

    def counted(update: int) -> Weights:
        return {"steps": np.array(update, np.int32), "mask": np.array([True, update % 2 == 0])}

    driver.start(scripts.whole(0) | counted(0), EVERY_OTHER)
    for update in range(1, 6):
        extra = counted(update)
        _train(driver, scripts.whole(update) | extra)
    require(not extra.keys() & driver.average().keys(), "integer leaves were averaged")
    with driver.averaged():
        inside = driver.weights()
    same_bits({name: inside[name] for name in extra}, extra, "integer leaves inside averaged()")


def check_tied_weights_are_averaged_once(make: MakeDriver) -> None:
    """(7) Weights with two names join each snapshot once, and both names have their average."""
    config, tied = SWAConfig(start="1step", every="1step", rule=EMA(0.5)), {"head": "kernel"}
    driver, core = make(), CoreDriver()

    def both(weights: Weights) -> Weights:
        return weights | {"head": weights["kernel"].copy()}

    for run in (driver, core):
        run.start(both(scripts.whole(0)), config, tied=tied)
    for weights in scripts.exact(EMA(0.5), Schedule(1, 1), 5):
        _train(driver, both(weights))
        core.train(both(weights))
    average = driver.average()
    close(average, core.average(), 1e-6, "the average of tied weights")
    with driver.averaged():
        same_bits(driver.weights(), average, "tied weights inside averaged()")


def check_frozen_weights_are_left_alone(make: MakeDriver) -> None:
    """(7) Weights that are not trained keep the value they have, also when swapped."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER, frozen=("bias",))
    frozen = scripts.whole(0)["bias"]
    for update in range(1, 6):
        if update == 4:
            frozen = scripts.whole(99)["bias"]  # somebody loads other ones
        _train(driver, scripts.whole(update) | {"bias": frozen})
    with driver.averaged():
        inside = driver.weights()
    same_bits({"bias": inside["bias"]}, {"bias": frozen}, "a frozen weight inside averaged()")
    same_bits({"bias": driver.weights()["bias"]}, {"bias": frozen}, "a frozen weight afterwards")


def check_changed_shape_is_refused(make: MakeDriver) -> None:
    """(8) A snapshot with a leaf of another shape raises StructureError; the average stays."""
    weights = scripts.whole(4)
    _check_change(make, weights | {"kernel": weights["kernel"].reshape(4, 3)}, "another shape")


def check_changed_dtype_is_refused(make: MakeDriver) -> None:
    """(8) A snapshot with a leaf that became integer raises StructureError; the average stays."""
    weights = scripts.whole(4)
    _check_change(make, weights | {"bias": weights["bias"].astype(np.int32)}, "another dtype")


def check_changed_number_is_refused(make: MakeDriver) -> None:
    """(8) A snapshot with a leaf too few raises StructureError; the average stays."""
    weights = scripts.whole(4)
    del weights["bias"]
    _check_change(make, weights, "a leaf missing")


def check_nonfinite_snapshot_is_skipped(make: MakeDriver) -> None:
    """(9) A snapshot with NaN or Inf leaves the average as it was, and is counted."""
    driver, core = _pair(make, scripts.whole(0), EVERY_OTHER)
    script = scripts.exact(Uniform(), Schedule(6, 4), 10)  # snapshots 6 and 10 are finite
    for update, weights in enumerate(script, start=1):
        spoilt = {2: np.nan, 3: np.nan, 4: np.inf, 8: -np.inf}.get(update)  # 3 is no snapshot
        if spoilt is not None:
            weights["kernel"].flat[5] = spoilt
        _train(driver, weights)
        core.train(weights)
        for count in ("n_averaged", "n_skipped"):
            got, expected = getattr(driver, count)(), getattr(core, count)()
            require(got == expected, f"{count} is {got} after update {update}, expected {expected}")
        if core.n_averaged():
            close(driver.average(), core.average(), 1e-6, f"the average after update {update}")


def check_nonfinite_is_kept_on_request(make: MakeDriver) -> None:
    """(9) With nonfinite="keep" the snapshot joins the average like any other."""
    driver = make()
    driver.start(scripts.whole(0), SWAConfig(start="1step", every="1step", nonfinite="keep"))
    weights = scripts.whole(1)
    weights["kernel"].flat[5] = np.nan
    _train(driver, weights)
    same_bits(driver.average(), weights, "the average of one snapshot with a NaN")
    _train(driver, scripts.whole(2))
    require(bool(np.isnan(driver.average()["kernel"].flat[5])), "the NaN vanished")
    counts = driver.n_averaged(), driver.n_skipped()
    require(counts == (2, 0), f"n_averaged, n_skipped are {counts}, expected (2, 0)")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


def _pair(make: MakeDriver, weights: Weights, config: SWAConfig) -> tuple[Driver, CoreDriver]:
    """The adapter's driver and the core's, started alike."""
    driver, core = make(), CoreDriver()
    for run in (driver, core):
        run.start(weights, config)
    return driver, core


def _averaged_some(make: MakeDriver) -> Driver:
    """A driver with two snapshots in the average, and training weights that differ from it."""
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    for weights in scripts.noisy(5):
        _train(driver, weights)
    return driver


def _train(driver: Driver, weights: Weights) -> None:
    driver.train(weights)
    same_bits(driver.weights(), weights, "the training weights after an update (a driver's fault?)")


def _same_run(actual: Driver, expected: Driver, when: str) -> None:
    same_bits(actual.weights(), expected.weights(), f"the weights, {when}")
    for count in ("n_averaged", "n_skipped"):
        got, wanted = getattr(actual, count)(), getattr(expected, count)()
        require(got == wanted, f"{count}, {when}: {got}, expected {wanted}")
    if expected.n_averaged():
        same_bits(actual.average(), expected.average(), f"the average, {when}")


def _check_change(make: MakeDriver, changed: Weights, what: str) -> None:
    driver = make()
    driver.start(scripts.whole(0), EVERY_OTHER)
    for update in (1, 2, 3):
        _train(driver, scripts.whole(update))
    average = driver.average()
    with _refused(StructureError, f"a snapshot with {what}"):
        driver.train(changed)
    same_bits(driver.average(), average, f"the average after the refused snapshot with {what}")
    require(driver.n_averaged() == 1, f"the refused snapshot with {what} was counted")


@contextmanager
def _refused(kind: type[SWAError], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise ConformanceError(f"{what} was not refused; expected {kind.__name__}")


@contextmanager
def _expecting(error: type[BaseException] | None) -> Iterator[None]:
    if error is None:
        yield
        return
    try:
        yield
    except error:
        return
    raise ConformanceError(f"{error.__name__} raised inside averaged() was swallowed")


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)
