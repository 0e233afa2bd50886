from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import (
    EMA,
    Polynomial,
    Schedule,
    StateError,
    StructureError,
    Uniform,
    init,
    state_from_dict,
    state_to_dict,
    update,
)
from swa_core.saving import VERSION, header, read_header

SCHEDULE, RULE = Schedule(2, 2), EMA(0.9)
EARLIER = "\nHint: load an earlier checkpoint."


def weights(value):
    rng = np.random.default_rng(value)
    return {
        "dense": {"kernel": rng.standard_normal((2, 3)).astype(np.float32)},
        "scale": [np.float64(value), np.float16(value)],
        "steps": np.int32(value),
    }


def train(state, first, last):
    for value in range(first, last + 1):
        new = weights(value)
        if value == 4:
            new["scale"][0] = np.nan
        state = update(state, new, SCHEDULE, RULE)
    return state


@pytest.fixture
def state():
    return train(init(weights(0)), 1, 7)


@pytest.fixture
def saved(state):
    return state_to_dict(state, schedule=SCHEDULE, rule=RULE)


def load(saved):
    return state_from_dict(saved, weights(99), schedule=SCHEDULE, rule=RULE)


def bits(state):
    return pickle.dumps([state[:4], [np.asarray(leaf).tobytes() for leaf in leaves(state)]])


def leaves(state):
    return [state.average["dense"]["kernel"], *state.average["scale"]]


# The round trip


@pytest.mark.parametrize("interruption", range(8))
def test_a_resumed_run_equals_the_uninterrupted_one(interruption):
    uninterrupted = train(init(weights(0)), 1, 8)
    before = train(init(weights(0)), 1, interruption)
    after = load(state_to_dict(before, schedule=SCHEDULE, rule=RULE))
    assert bits(after) == bits(before)
    assert bits(train(after, interruption + 1, 8)) == bits(uninterrupted)


def test_the_structure_comes_back(state, saved):
    loaded = load(saved)
    assert loaded.average["steps"] is None
    assert [type(leaf) for leaf in leaves(loaded)] == [np.ndarray] * 3
    assert [leaf.dtype for leaf in leaves(loaded)] == [np.float32, np.float64, np.float32]
    assert (loaded.n_averaged, loaded.n_skipped, loaded.updates) == (2, 1, 7)


def test_a_loaded_state_shares_no_memory(saved):
    loaded = load(saved)
    for held, leaf in zip(saved["average"].values(), leaves(loaded), strict=True):
        assert not np.shares_memory(held, leaf)


def test_an_npz_file_keeps_it_all(saved):
    file = io.BytesIO()
    head = {name: value for name, value in saved.items() if name != "average"}
    np.savez(file, **saved["average"], header=json.dumps(head))
    file.seek(0)
    with np.load(file) as stored:
        arrays = dict(stored)
    read = {**json.loads(str(arrays.pop("header"))), "average": arrays}
    assert bits(load(read)) == bits(load(saved))


def test_counters_may_come_back_as_arrays(saved):
    # What npz, orbax or torch make of numbers.
    for name in ("version", "n_updates", "n_averaged", "n_skipped"):
        saved[name] = np.array(saved[name])
    saved["total"] = np.float64(saved["total"])
    saved["schedule"] = tuple(saved["schedule"])
    loaded = load(saved)
    assert [type(value) for value in loaded[:4]] == [int, int, int, float]


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.1), EMA(half_life=1 / 3), Polynomial(0.1)])
@pytest.mark.parametrize("schedule", [Schedule(1, 1), Schedule(3, 4, 5)])
def test_the_header_is_json_and_reads_back(state, schedule, rule):
    head = header(state, schedule, rule)
    again = json.loads(json.dumps(head, allow_nan=False))
    assert again == head
    assert read_header(again, schedule, rule) == read_header(header(state))
    assert head["version"] == VERSION == 1


def test_the_header_holds_the_counters(state):
    assert read_header(header(state)) == {
        "n_updates": 7, "n_averaged": 2, "n_skipped": 1, "total": state.total
    }  # fmt: skip


def test_what_was_not_saved_is_not_checked(state):
    saved = state_to_dict(state)
    assert "schedule" not in saved
    assert "rule" not in saved
    assert bits(load(saved)) == bits(state)


def test_what_this_training_does_not_say_is_not_checked(saved):
    assert state_from_dict(saved, weights(0)).n_averaged == 2


# What cannot be loaded


def refused(error, message, saved, now=None, **options):
    options = {"schedule": SCHEDULE, "rule": RULE} | options
    with pytest.raises(error) as caught:
        state_from_dict(saved, weights(0) if now is None else now, **options)
    assert message in str(caught.value)
    assert "\nHint: " in str(caught.value)


@pytest.mark.parametrize("saved", [None, 5, "state", [], {}, {"average": {}}])
def test_something_else_is_refused(saved):
    refused(StateError, "this is no saved average: it has no version.", saved)


@pytest.mark.parametrize("name", ["n_updates", "n_averaged", "n_skipped", "total", "average"])
def test_a_truncated_state_is_refused(saved, name):
    del saved[name]
    what = "its arrays are" if name == "average" else name
    refused(StateError, f"the saved average is truncated: {what} missing.{EARLIER}", saved)


def test_all_that_is_missing_is_named(saved):
    del saved["n_updates"], saved["total"]
    refused(StateError, "truncated: n_updates, total missing.", saved)


def test_a_truncated_average_is_refused_with_the_path(saved):
    # What is left of the checkpoint is, so to speak, an average of other weights.
    del saved["average"]["scale/0"]
    refused(StructureError, "cannot load the saved average: leaf 'scale/0'", saved)


def test_a_newer_version_is_refused(saved):
    message = "has version 2, and this swa-core reads up to 1.\nHint: update swa-core."
    refused(StateError, message, saved | {"version": 2})


@pytest.mark.parametrize("name", ["version", "n_updates", "n_averaged", "n_skipped"])
@pytest.mark.parametrize("bad", [-1, 2.0, "2", None, True, [2], np.array([1, 2]), np.nan])
def test_a_damaged_counter_is_refused(saved, name, bad):
    refused(StateError, f"the saved average is damaged: {name} is {bad!r}", saved | {name: bad})


@pytest.mark.parametrize(
    "bad", [pytest.param(10**400, id="large"), -1.0, "2.0", None, True, [2.0], np.nan, np.inf, 1j]
)
def test_a_damaged_total_is_refused(saved, bad):
    refused(StateError, f"the saved average is damaged: total is {bad!r}", saved | {"total": bad})


def test_a_total_that_would_forget_the_average_is_refused(saved):
    refused(StateError, "total is 0.0, and at least 1 with any snapshot", saved | {"total": 0.0})


@pytest.mark.parametrize("bad", [5, [1], [1, 2, 3, 4], {}])
def test_a_damaged_schedule_is_refused(saved, bad):
    message = f"the saved average is damaged: schedule is {bad!r}"
    refused(StateError, message, saved | {"schedule": bad})


@pytest.mark.parametrize("bad", [None, 5, [], "arrays"])
def test_a_damaged_average_is_refused(saved, bad):
    refused(StateError, "its arrays are missing", saved | {"average": bad})


@pytest.mark.parametrize("bad", ["text", 3, np.ones((2, 3), np.int64), None, object()])
def test_a_damaged_leaf_is_refused(saved, bad):
    saved["average"]["dense/kernel"] = bad
    refused(StateError, "the saved average is damaged: leaf 'dense/kernel' has dtype", saved)


def test_an_average_that_was_cast_down_is_refused(saved):
    saved["average"]["dense/kernel"] = saved["average"]["dense/kernel"].astype(np.float16)
    refused(StructureError, "leaf 'dense/kernel' has dtype float32, but the running avera", saved)


def test_another_schedule_is_refused(saved):
    message = (
        "was made with schedule Schedule(start=2, every=2, stop=None), and this training has "
        "Schedule(start=2, every=3, stop=None)."
    )
    refused(StateError, message, saved, schedule=Schedule(2, 3))
    refused(StateError, "was made with schedule", saved, schedule=Schedule(2, 2, 100))


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.99), Polynomial(), EMA(half_life=6.6)])
def test_another_rule_is_refused(saved, rule):
    message = "was made with rule {'name': 'ema', 'decay': 0.9}, and this training has"
    refused(StateError, message, saved, rule=rule)


@pytest.mark.parametrize("rule", [5, [], "emaa", {"name": "ema", "decay": "0.9"}])
def test_a_damaged_rule_is_another_rule(saved, rule):
    refused(StateError, f"was made with rule {rule!r}", saved | {"rule": rule})


def test_other_weights_are_refused_with_the_path(saved):
    hint = "\nHint: load it into the model it was saved with."
    for changes, message in (
        ({"scale": [np.float64(1)]}, "leaf 'scale/1' is missing."),
        ({"head": np.ones(1)}, "leaf 'head' of dtype float64 is not in the running average; it is"),
        ({"steps": np.float32(1)}, "leaf 'steps' of dtype float32 is not in the running average"),
        (
            {"dense": {"kernel": np.ones((3, 2), np.float32)}},
            "leaf 'dense/kernel' has shape (3, 2)",
        ),
        ({"dense": {"kernel": np.ones((2, 3))}}, "leaf 'dense/kernel' has dtype float64"),
    ):
        now = weights(0) | changes
        refused(StructureError, f"cannot load the saved average: {message}", saved, now)
        with pytest.raises(StructureError, match="load it into the model") as caught:
            state_from_dict(saved, now)
        assert str(caught.value).endswith(hint)


names = st.sampled_from(
    ["version", "n_updates", "n_averaged", "n_skipped", "total", "schedule", "rule"]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
junk = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.dictionaries(names, junk))
def test_anything_is_a_header_or_a_state_error(damage):
    saved = header(init(weights(0)), SCHEDULE, RULE) | damage
    try:
        counters = read_header(saved, SCHEDULE, RULE)
    except StateError:
        return
    assert all(count >= 0 for count in counters.values())


def test_paths_that_meet_cannot_be_saved(state):
    one = np.ones(1)
    with pytest.raises(StructureError, match="two leaves have the path 'a/b'"):
        state_to_dict(state._replace(average={"a/b": one, "a": {"b": one}}))
