"""Names in a checkpoint's descriptions must not make anything else be read."""

from __future__ import annotations

from pathlib import Path


def is_contained(folder: Path, name: str) -> bool:
    """Whether a name is that of something inside a folder, links resolved.

    >>> is_contained(Path("here"), "a/b"), is_contained(Path("here"), "../a")
    (True, False)
    """
    try:
        there = (folder / name).resolve()
        return not Path(name).is_absolute() and there.is_relative_to(folder.resolve())
    except (ValueError, RuntimeError):  # no name that a file can have; links in a circle
        return False
