"""The ``[swa]`` table in files: TOML and JSON read, and written without losing anything."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swa_core.atomic import replacing
from swa_core.errors import ConfigError, Fault

_SUFFIXES = (".toml", ".json")


def read_table(path: Path) -> tuple[Any, str]:
    """The table of a file, and the path of its keys: "swa", or "tool.swa" in a pyproject.

    Raises:
      ConfigError: no TOML or JSON, or it holds no such table.
      OSError: the file cannot be read.
    """
    document = _read(path)
    places = [("swa",), ("tool", "swa")]
    if path.name == "pyproject.toml":
        places.reverse()
    for place in places:
        table: Any = document
        for key in place:
            table = table.get(key) if isinstance(table, Mapping) else None
        if table is not None:
            return table, ".".join(place)
    wanted = ".".join(places[0])
    held = ", ".join(f'"{key}"' for key in document) or "nothing"
    message = f"the table is missing; the file holds {held}. Put the settings below [{wanted}]."
    raise ConfigError([Fault(wanted, message)], source=path.name)


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a file that holds ``table`` as its only table "swa".

    Raises:
      ConfigError: neither TOML nor JSON, or what stands there holds something else.
      OSError: the file cannot be written.
    """
    _check_suffix(path)
    if path.exists() and (others := sorted(_read(path).keys() - {"swa"})):
        message = (
            f"the file also holds {', '.join(others)}, which writing would lose. "
            "Choose another name, or paste the settings into it by hand."
        )
        raise ConfigError([Fault("", message)], source=path.name)
    text = _toml(table) if path.suffix == ".toml" else json.dumps({"swa": table}, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        message = f'unknown kind of file "{path.suffix}". Known are {", ".join(_SUFFIXES)}.'
        raise ConfigError([Fault("", message)], source=path.name)


def _read(path: Path) -> dict[str, Any]:
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a byte-order mark
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # what tomllib, json and a wrong encoding raise
        raise ConfigError([Fault("", f"cannot be read: {error}.")], source=path.name) from error
    if not isinstance(document, dict):
        message = 'holds no table. Write { "swa": { ... } }.'
        raise ConfigError([Fault("", message)], source=path.name)
    return document


def _toml(table: Mapping[str, Any]) -> str:
    """A ``[swa]`` table as TOML: the standard library reads it but does not write it."""
    lines = ["[swa]", *(_toml_pair(key, value) for key, value in table.items() if key != "lr")]
    if "lr" in table:
        lines += ["", "[swa.lr]", *(_toml_pair(*item) for item in table["lr"].items())]
    return "\n".join(lines) + "\n"


def _toml_pair(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key} = {{ {', '.join(_toml_pair(*item) for item in value.items())} }}"
    return f"{key} = {json.dumps(value)}"  # strings and numbers are written alike in both
