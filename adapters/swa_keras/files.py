"""The callback's state as a file that any framework reads: see ``swa_core.save_average``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from swa_core import StateError, SWAConfig, SWAState, load_average, save_average
from swa_core.saving import COUNTERS, read_schedule

_OWN = ("unit", "epochs", "base_rate", "paths")


def write(path: str | os.PathLike[str], saved: Mapping[str, Any], config: SWAConfig) -> None:
    """Writes what ``state_dict`` returned.

    Raises:
      StructureError, StateError, OSError: of ``swa_core.save_average``; an older file stays.
    """
    average = dict(zip(saved["paths"], saved["average"], strict=True))
    state = SWAState(**{name: saved[name] for name in COUNTERS}, average=average)
    extra = {name: saved[name] for name in _OWN}
    live = saved["live"]
    beside = {} if live is None else _numbered("weights", live) | _numbered("state", live)
    extra["live"] = None if live is None else {name: len(live[name]) for name in live}
    schedule = saved["schedule"] and read_schedule(saved["schedule"])
    save_average(
        path, state, config, schedule=schedule, framework="keras", extra=extra, beside=beside
    )


def read(path: str | os.PathLike[str]) -> tuple[SWAConfig, dict[str, Any]]:
    """The configuration, and what ``load_state_dict`` takes.

    Raises:
      StateError: no average, damaged, or saved by another adapter.
      OSError: the file cannot be read.
    """
    found = load_average(path)
    extra = found.extra
    if found.framework != "keras" or any(name not in extra for name in (*_OWN, "live")):
        raise StateError(
            f"{os.path.basename(path)} holds an average that {found.framework or 'another'} "
            "saved, and not this callback.",
            hint="read it with swa_core.load_average.",
        )
    try:
        average = [found.state.average[name] for name in extra["paths"]]
        live = extra["live"] and {
            kind: [found.beside[f"{kind}/{place}"] for place in range(number)]
            for kind, number in extra["live"].items()
        }
    except (KeyError, TypeError) as error:
        raise StateError(
            f"{os.path.basename(path)} is damaged: the array {error} is missing.",
            hint="load an earlier file.",
        ) from error
    counters = {name: getattr(found.state, name) for name in COUNTERS}
    own = {name: extra[name] for name in _OWN}
    rule = found.config.to_dict()["rule"]
    schedule = found.schedule and list(found.schedule)
    head = {"version": 1, **counters, "rule": rule, "schedule": schedule}
    return found.config, {**head, **own, "average": average, "live": live}


def _numbered(kind: str, live: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{kind}/{place}": array for place, array in enumerate(live[kind])}
