"""A state as a plain dictionary and back: what every adapter saves, with a version number."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from swa_core import trees
from swa_core.averaging import SWAState, check_leaves
from swa_core.config_reading import write_rule
from swa_core.errors import StateError
from swa_core.rules import Rule
from swa_core.schedule import Schedule
from swa_core.trees import Tree

VERSION = 1
COUNTERS = {"n_updates": int, "n_averaged": int, "n_skipped": int, "total": float}


def header(
    state: SWAState, schedule: Schedule | None = None, rule: Rule | None = None
) -> dict[str, Any]:
    """Everything of a state but its arrays: version, counters, and what they were counted by.

    Plain ints, floats, strings, lists and dicts only, so that any format takes it.

    >>> header(SWAState(7, 2, 0, 2.0, None), Schedule(5, 2))["schedule"]
    [5, 2, None]
    """
    counters = {name: kind(getattr(state, name)) for name, kind in COUNTERS.items()}
    saved: dict[str, Any] = {"version": VERSION, **counters}
    if schedule is not None:
        saved["schedule"] = list(schedule)
    if rule is not None:
        saved["rule"] = write_rule(rule)
    return saved


def read_header(
    saved: Any, schedule: Schedule | None = None, rule: Rule | None = None
) -> dict[str, Any]:
    """The counters of a saved state, after checking that this training can go on with it.

    Args:
      saved: what ``header`` returned, with or without more beside it.
      schedule: of this training; None (on either side) leaves it unchecked.
      rule: likewise.

    Raises:
      StateError: truncated, damaged, of a newer version, of another schedule or rule.
    """
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise StateError(
            "this is no saved average: it has no version.", hint="load what state_to_dict returned."
        )
    if (version := _count(saved, "version")) > VERSION:
        raise StateError(
            f"the saved average has version {version}, and this swa-core reads up to {VERSION}.",
            hint="update swa-core.",
        )
    if missing := [name for name in COUNTERS if name not in saved]:
        raise StateError(
            f"the saved average is truncated: {', '.join(missing)} missing.", hint=_EARLIER
        )
    counters = {
        name: _count(saved, name) if kind is int else _total(saved[name])
        for name, kind in COUNTERS.items()
    }
    if counters["n_averaged"] and counters["total"] < 1:
        raise _damaged(f"total is {counters['total']}, and at least 1 with any snapshot")
    made_with = saved.get("schedule")
    if schedule is not None and made_with is not None and read_schedule(made_with) != schedule:
        raise _of_another("schedule", read_schedule(made_with), schedule)
    made_with = saved.get("rule")
    if rule is not None and made_with is not None and made_with != write_rule(rule):
        raise _of_another("rule", made_with, write_rule(rule))
    return counters


_EARLIER = "load an earlier checkpoint."


def _damaged(what: str) -> StateError:
    return StateError(f"the saved average is damaged: {what}.", hint=_EARLIER)


def _of_another(name: str, before: Any, now: Any) -> StateError:
    return StateError(
        f"the saved average was made with {name} {before!r}, and this training has {now!r}.",
        hint="load it with the configuration and lengths it was saved with, or start a new "
        "average.",
    )


def _count(saved: Mapping[str, Any], name: str) -> int:
    value = saved[name]
    try:
        # What formats make of an int (a 0-d array, say) is one still; a bool or 7.5 never was.
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise _damaged(f"{name} is {value!r}, and should be a whole number")
    return count


def _total(value: Any) -> float:
    try:
        total = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        total = math.nan
    if not 0 <= total < math.inf:
        raise _damaged(f"total is {value!r}, and should be a number")
    return total


def read_schedule(value: Any) -> Schedule:
    """The schedule of a saved state, which ``header`` wrote as a list.

    Raises:
      StateError: it is none.
    """
    try:
        start, every, stop = value
        start, every = operator.index(start), operator.index(every)
        stop = None if stop is None else operator.index(stop)
        if start < 0 or every < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise _damaged(f"schedule is {value!r}, and should be start, every and stop") from None
    return Schedule(start, every, stop)


def state_to_dict(
    state: SWAState, *, schedule: Schedule | None = None, rule: Rule | None = None
) -> dict[str, Any]:
    """A state as a plain dictionary: version, counters, and the average's arrays by path.

    Args:
      state: the state; its arrays are not copied.
      schedule: saved too, so that loading into another schedule is refused.
      rule: likewise.

    Raises:
      StructureError: two leaves have the same path.

    >>> state = SWAState(7, 2, 0, 2.0, {"dense": {"bias": np.zeros(1, np.float32)}})
    >>> state_to_dict(state)["average"]
    {'dense/bias': array([0.], dtype=float32)}
    """
    average = trees.by_path(state.average)
    return {**header(state, schedule, rule), "average": average}


def state_from_dict(
    saved: Mapping[str, Any],
    weights: Tree,
    *,
    schedule: Schedule | None = None,
    rule: Rule | None = None,
) -> SWAState:
    """The state that ``state_to_dict`` saved, for a training of these weights.

    Args:
      saved: what ``state_to_dict`` returned.
      weights: the weights of the training that goes on, for the structure.
      schedule: of this training; checked if both sides know theirs.
      rule: likewise.

    Raises:
      StateError: truncated, damaged, newer, or of another schedule or rule.
      StructureError: of other weights.

    >>> weights = {"w": np.ones(2, np.float32)}
    >>> saved = state_to_dict(SWAState(7, 1, 0, 1.0, weights))
    >>> state_from_dict(saved, weights).average
    {'w': array([1., 1.], dtype=float32)}
    """
    counters = read_header(saved, schedule, rule)
    average = saved.get("average")
    if not isinstance(average, Mapping):
        raise StateError("the saved average is truncated: its arrays are missing.", hint=_EARLIER)
    held = {path: np.asarray(leaf) for path, leaf in average.items()}
    for path, leaf in held.items():
        if not trees.is_inexact(leaf.dtype):
            raise _damaged(f"leaf '{path}' has dtype {leaf.dtype}, and should be floating-point")
    now = {path: np.asarray(leaf) for path, leaf in trees.by_path(weights).items()}
    check_leaves(
        held, now, "cannot load the saved average", "load it into the model it was saved with."
    )

    def restored(path: str, leaf: Any) -> Any:
        return held[path].copy() if path in held else None

    return SWAState(**counters, average=trees.map_with_path(restored, weights))
