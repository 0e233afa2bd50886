"""A state as a plain dictionary and back: what every adapter saves, with a version number."""

from __future__ import annotations

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
COUNTERS = {"updates": int, "n_averaged": int, "n_skipped": int, "total": float}


def header(state: SWAState, schedule: Schedule | None = None, rule: Rule | None = None) -> dict[str, Any]:
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
      StateError: truncated, of a newer version, of another schedule or rule.
    """
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise StateError(
            "this is no saved average: it has no version.", hint="load what state_to_dict returned."
        )
    if not isinstance(saved["version"], int) or saved["version"] > VERSION:
        raise StateError(
            f"the saved average has version {saved['version']}, and this swa-core reads up to "
            f"{VERSION}.",
            hint="update swa-core.",
        )
    if missing := [name for name in COUNTERS if name not in saved]:
        raise StateError(
            f"the saved average is truncated: {', '.join(missing)} missing.",
            hint="load an earlier checkpoint.",
        )
    for name, now in (
        ("schedule", schedule and list(schedule)),
        ("rule", rule and write_rule(rule)),
    ):
        before = saved.get(name)
        before = list(before) if name == "schedule" and before is not None else before
        if now is not None and before is not None and before != now:
            raise StateError(
                f"the saved average was made with {name} {_say(name, before)}, and this training "
                f"has {_say(name, now)}.",
                hint="load it with the configuration and lengths it was saved with, or start a new "
                "average.",
            )
    try:
        return {name: kind(saved[name]) for name, kind in COUNTERS.items()}
    except (TypeError, ValueError) as error:
        raise StateError(
            f"the saved average is damaged: {error}.", hint="load an earlier checkpoint."
        ) from error


def _say(name: str, value: Any) -> str:
    return str(Schedule(*value)) if name == "schedule" else repr(value)


def state_to_dict(
    state: SWAState, *, schedule: Schedule | None = None, rule: Rule | None = None
) -> dict[str, Any]:
    """A state as a plain dictionary: version, counters, and the average's arrays by path.

    Args:
      state: the state; its arrays are not copied.
      schedule: saved too, so that loading into another schedule is refused.
      rule: likewise.

    >>> state = SWAState(7, 2, 0, 2.0, {"dense": {"bias": np.zeros(1, np.float32)}})
    >>> state_to_dict(state)["average"]
    {'dense/bias': array([0.], dtype=float32)}
    """
    average: dict[str, Any] = {}
    for path, leaf in trees.leaves(state.average):
        if path in average:
            raise StateError(
                f"two leaves have the path '{path}', so they cannot be saved apart.",
                hint="use keys without '/'.",
            )
        average[path] = leaf
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
        raise StateError(
            "the saved average is truncated: its arrays are missing.",
            hint="load an earlier checkpoint.",
        )
    held = {path: np.asarray(leaf) for path, leaf in average.items()}
    now = {
        path: np.asarray(leaf)
        for path, leaf in trees.leaves(weights)
        if trees.is_inexact(np.asarray(leaf).dtype)
    }
    check_leaves(
        held, now, "cannot load the saved average", "load it into the model it was saved with."
    )

    def restored(path: str, leaf: Any) -> Any:
        return held[path].copy() if path in held else None

    return SWAState(**counters, average=trees.map_with_path(restored, weights))
