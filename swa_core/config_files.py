"""The ``[swa]`` table in files: TOML and JSON read, and written without losing anything."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swa_core.errors import ConfigError, Fault

_SUFFIXES = (".toml", ".json")


def read_table(path: Path) -> tuple[dict[str, Any], str]:
    """The table of a file, and the path of its keys: "swa", or "tool.swa" in a pyproject."""
    document = _read(path)
    places = [("tool", "swa"), ("swa",)] if path.name == "pyproject.toml" else [("swa",), ("tool", "swa")]
    for place in places:
        table: Any = document
        for key in place:
            table = table.get(key) if isinstance(table, Mapping) else None
        if table is not None:
            return table, ".".join(place)
    wanted = ".".join(places[0])
    held = ", ".join(f'"{key}"' for key in document) or "nothing"
    raise ConfigError(
        [Fault(wanted, f"the table is missing; the file holds {held}. Put the settings below [{wanted}].")],
        source=path.name,
    )


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a file that holds ``table`` as its only table "swa"."""
    _check_suffix(path)
    if path.exists() and (others := sorted(_read(path).keys() - {"swa"})):
        raise ConfigError(
            [Fault("", f"the file also holds {', '.join(others)}, which writing would lose. Choose another.")],
            source=path.name,
        )
    text = _toml(table) if path.suffix == ".toml" else json.dumps({"swa": table}, indent=2) + "\n"
    # Written beside it and renamed: whoever reads meanwhile sees the old file or the new one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            [Fault("", f'unknown kind of file "{path.suffix}". Known are {", ".join(_SUFFIXES)}.')],
            source=path.name,
        )


def _read(path: Path) -> dict[str, Any]:
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # what tomllib, json and a wrong encoding raise
        raise ConfigError([Fault("", f"cannot be read: {error}.")], source=path.name) from error
    if not isinstance(document, dict):
        raise ConfigError([Fault("", "holds no table.")], source=path.name)
    return document


def _toml(table: Mapping[str, Any]) -> str:
    """A ``[swa]`` table as TOML: the standard library reads it but does not write it."""
    lines = ["[swa]"]
    for key, value in table.items():
        if key != "lr":
            lines.append(f"{key} = {_toml_value(value)}")
    if "lr" in table:
        lines += ["", "[swa.lr]", *(f"{key} = {_toml_value(value)}" for key, value in table["lr"].items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)  # strings and numbers are written alike in both
