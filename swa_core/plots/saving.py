"""Curves as plain dictionaries and JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from swa_core.atomic import replacing
from swa_core.errors import StateError

if TYPE_CHECKING:
    from swa_core.plots.measured import Measured

VERSION = 1
_Kind = TypeVar("_Kind", bound="Measured")


def plain(value: Any) -> Any:
    """A value in what strict JSON has: NaN becomes None, an infinity a string.

    >>> plain({"a": np.array([1.0, np.nan, np.inf])})
    {'a': [1.0, None, 'inf']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def numbers(value: Any) -> Any:
    """The numbers that ``plain`` made a list of, lists of any nesting.

    >>> numbers([1.0, None, "-inf"])
    [1.0, nan, -inf]
    """
    if isinstance(value, (list, tuple)):
        return [numbers(part) for part in value]
    if value is None:
        return math.nan
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return float(value)


def built(kind: type[_Kind], saved: Any) -> _Kind:
    """Curves of a kind out of what ``to_dict`` gave.

    Raises:
      StateError: it is something else, damaged, or newer.
    """
    if not isinstance(saved, Mapping) or saved.get("kind") != kind.kind:
        found = saved.get("kind") if isinstance(saved, Mapping) else type(saved).__name__
        raise StateError(
            f"expected a saved {kind.kind}, got {found!r}.",
            hint="pass what to_dict() returned, or a file that save() wrote.",
        )
    version = saved.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise StateError(
            f"the saved {kind.kind} has version {version!r}, and this swa-core reads up to "
            f"{VERSION}.",
            hint="update swa-core.",
        )
    try:
        found = {field.name: saved[field.name] for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**kind._read(found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(
            f"the saved {kind.kind} is damaged: {type(error).__name__}: {error}."
        ) from error


def save(path: str | os.PathLike[str], saved: Mapping[str, Any]) -> None:
    """Writes a dictionary as JSON, whole or not at all."""
    text = json.dumps(saved, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def from_dict(saved: Mapping[str, Any]) -> Any:
    """A ``Line``, ``Plane`` or ``Rays`` out of what its ``to_dict`` returned.

    Raises:
      StateError: it is something else, damaged, or newer.
    """
    from swa_core.plots.curves import Line, Rays
    from swa_core.plots.plane import Plane

    kinds: dict[str, Any] = {kind.kind: kind for kind in (Line, Plane, Rays)}
    kind = saved.get("kind") if isinstance(saved, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise StateError(
            f"this is no saved line, plane or rays: its kind is {kind!r}.",
            hint="pass what to_dict() returned.",
        )
    return built(kinds[kind], saved)


def load(path: str | os.PathLike[str]) -> Any:
    """A ``Line``, ``Plane`` or ``Rays`` from the file that its ``save`` wrote.

    Raises:
      StateError: the file holds something else, is damaged, or newer.
      OSError: it cannot be read.

    >>> import tempfile
    >>> from swa_core import plots
    >>> file = tempfile.mkdtemp() + "/line.json"
    >>> plots.Line(positions=[0, 1], measures={"loss": [2, 1]}, length=3).save(file)
    >>> plots.load(file).values()
    array([2., 1.])
    """
    name = os.path.basename(path)
    with open(path, "rb") as file:
        content = file.read()
    try:
        saved = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StateError(f"{name} is no JSON file: {error}.", hint="it may be truncated.") from None
    return from_dict(saved)
