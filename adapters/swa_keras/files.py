"""The callback's state as a file that any framework reads: see ``swa_core.save_average``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from swa_core import AverageFile, StateError, SWAConfig, SWAState, load_average, save_average
from swa_core.averaging import check_leaves
from swa_core.saving import COUNTERS, header, read_schedule
from swa_keras.averages import leaves_of
from swa_keras.lending import usable
from swa_keras.model_state import averaged_variables

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
    """The configuration, and what ``load_state_dict`` takes, of what this callback wrote.

    Raises:
      StateError: no average, damaged, or saved by another adapter.
      OSError: the file cannot be read.
    """
    found = load_average(path)
    name = os.path.basename(path)
    extra = found.extra
    if found.framework != "keras" or any(key not in extra for key in (*_OWN, "live")):
        raise StateError(
            f"{name} holds an average that {found.framework or 'another'} saved, and not this "
            "callback.",
            hint="say model=..., and names={...} for the names that its variables have there.",
        )
    average = found.state.average
    try:
        arrays = [average[key] for key in extra["paths"]]
        live = extra["live"] and {
            kind: [found.beside[f"{kind}/{place}"] for place in range(number)]
            for kind, number in extra["live"].items()
        }
    except (KeyError, TypeError) as error:
        raise StateError(
            f"{name} is damaged: the array {error} is missing.", hint="load an earlier file."
        ) from error
    own = {key: extra[key] for key in _OWN}
    return found.config, {**_header(found), **own, "average": arrays, "live": live}


def read_for(
    model: Any,
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None,
    transform: Mapping[str, Callable[[Any], Any]] | None,
) -> tuple[SWAConfig, dict[str, Any]]:
    """The same of what anybody wrote, for a model whose variables may have other names.

    Raises:
      StateError: no average, or damaged.
      StructureError: of other variables.
      OSError: the file cannot be read.
    """
    found = load_average(path)
    if found.framework == "keras" and names is None and transform is None:
        return read(path)  # whose variables are matched by their order, whatever their names
    if names is not None or transform is not None:
        same = {name: name for name in found.state.average}
        found = found.renamed(same if names is None else names, transform)
    found.refuse_counts()
    average = found.state.average
    leaves = leaves_of(averaged_variables(usable(model)))
    if found.state.n_averaged:
        hint = "pass names={...} if variables are named otherwise in the file."
        check_leaves(average, leaves, "cannot load the saved average", hint)
    paths = [path for path in leaves if path in average]
    own = {"unit": None, "epochs": 0, "base_rate": None, "paths": paths}
    arrays = [average[path] for path in paths]
    return found.config, {**_header(found), **own, "average": arrays, "live": None}


def _header(found: AverageFile) -> dict[str, Any]:
    schedule = found.schedule and list(found.schedule)
    return {**header(found.state, rule=found.config.rule), "schedule": schedule}


def _numbered(kind: str, live: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{kind}/{place}": array for place, array in enumerate(live[kind])}
