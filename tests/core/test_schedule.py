from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import Schedule

END = 60

schedules = st.builds(
    Schedule,
    start=st.integers(0, 25),
    every=st.integers(1, 12),
    stop=st.none() | st.integers(0, 50),
)


def by_hand(schedule, end=END):
    """The snapshots among the first ``end`` updates, counted as the authors' train.py counts."""
    found, due = [], schedule.start or schedule.every
    for update in range(1, end + 1):
        if update == due:
            due += schedule.every
            if schedule.stop is None or update <= schedule.stop:
                found.append(update)
    return found


class Traced:
    """A number as a compiler sees it while tracing: operators, and nothing of Python's own."""

    def __init__(self, value):
        self.value = value

    def _refuse(self, *args):
        raise TypeError("the value is not known while tracing")

    __bool__ = __int__ = __index__ = __float__ = __len__ = __hash__ = __iter__ = _refuse


def _traced(operation):
    return lambda self, other: Traced(operation(self.value, getattr(other, "value", other)))


for name in ("add", "sub", "mod", "floordiv", "and_", "or_", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Traced, f"__{name.strip('_')}__", _traced(getattr(operator, name)))


def test_counts_as_the_authors_do():
    schedule = Schedule(start=10, every=4)
    assert [update for update in range(20) if schedule.is_snapshot(update)] == [10, 14, 18]


@given(schedules)
def test_python_numpy_and_traced_values_agree(schedule):
    updates = np.arange(END + 1, dtype=np.int32)
    expected = by_hand(schedule)
    plain = [schedule.is_snapshot(int(update)) for update in updates]
    assert all(type(due) is bool for due in plain)
    assert [int(update) for update in updates[plain]] == expected
    for shape in ((END + 1,), (1, END + 1, 1)):
        due = schedule.is_snapshot(updates.reshape(shape))
        assert due.dtype == bool
        assert due.shape == shape
        assert due.ravel().tolist() == plain
    traced = [schedule.is_snapshot(Traced(int(update))) for update in updates]
    assert [due.value for due in traced] == plain
    assert schedule.is_snapshot(updates[3]) == plain[3]  # a numpy scalar
    assert schedule.is_snapshot(np.array(3)) == plain[3]


@pytest.mark.parametrize(
    "schedule", [Schedule(10, 4), Schedule(0, 3), Schedule(1, 1, 5), Schedule(7, 5, 22)]
)
def test_jax_traces_it_under_strict_promotion(jax_strict, schedule):
    jnp = jax_strict.numpy
    traces = []

    @jax_strict.jit
    def due(update):
        traces.append(update)
        return schedule.is_snapshot(update)

    found = [update for update in range(END + 1) if due(jnp.int32(update))]
    assert found == by_hand(schedule)
    assert len(traces) == 1
    assert due(jnp.int32(0)).dtype == bool
    updates = jnp.arange(END + 1, dtype=jnp.int32)
    assert np.flatnonzero(jax_strict.vmap(schedule.is_snapshot)(updates)).tolist() == found


@given(schedules, st.integers(0, END))
def test_everything_else_agrees_with_is_snapshot(schedule, total):
    taken = [update for update in range(total + 1) if schedule.is_snapshot(update)]
    assert list(schedule.snapshots(total)) == taken
    assert schedule.total(total) == len(taken)
    assert schedule.last(total) == (taken[-1] if taken else None)
    assert schedule.n_snapshots(total) == len(taken)
    assert type(schedule.n_snapshots(total)) is int
    following = [update for update in by_hand(schedule) if update > total]
    expected = following[0] if following else None
    if expected is None and schedule.stop is None:
        assert schedule.next_after(total) > END
    else:
        assert schedule.next_after(total) == expected


@given(schedules)
def test_n_snapshots_of_an_array(schedule):
    updates = np.arange(END + 1)
    counts = schedule.n_snapshots(updates)
    assert counts.tolist() == np.cumsum(schedule.is_snapshot(updates)).tolist()
    assert np.issubdtype(counts.dtype, np.integer)


@given(schedules.filter(lambda schedule: schedule.stop is not None))
def test_a_stop_bounds_what_is_asked_without_a_length(schedule):
    taken = by_hand(schedule)
    assert list(schedule.snapshots()) == taken
    assert schedule.total() == len(taken)
    assert schedule.last() == (taken[-1] if taken else None)


@given(schedules)
def test_a_countdown_meets_every_snapshot(schedule):
    met, update = [], 0
    while (due := schedule.next_after(update)) is not None and due <= END:
        met.append(due)
        update = due
    assert met == by_hand(schedule)


def test_a_start_of_zero_means_every():
    schedule = Schedule(start=0, every=4)
    assert schedule.first == 4
    assert not schedule.is_snapshot(0)
    assert list(schedule.snapshots(12)) == [4, 8, 12]


def test_stop_is_the_last_update_that_may_be_a_snapshot():
    assert list(Schedule(10, 4, 18).snapshots(99)) == [10, 14, 18]
    assert list(Schedule(10, 4, 17).snapshots(99)) == [10, 14]


@pytest.mark.parametrize("ask", ["snapshots", "last", "total"])
def test_without_an_end_there_is_no_last_one(ask):
    with pytest.raises(ValueError, match="say total_steps"):
        getattr(Schedule(10, 4), ask)()
