"""What the commands of the overhead benchmarks have in common: their options and their JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import Table

QUICK_ROUNDS = 3


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """``--rounds``, ``--json`` and ``--quick``; the rest is each benchmark's own."""
    out = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--rounds", type=int, default=rounds, help=f"that count (default: {rounds})")
    out.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    out.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds of next to nothing: whether all runs, no figures",
    )
    return out


def rounds(options: argparse.Namespace) -> int:
    """How many rounds count."""
    return QUICK_ROUNDS if options.quick else options.rounds


def chosen(
    parser: argparse.ArgumentParser, option: str, value: str, known: Sequence[str]
) -> list[str]:
    """A comma-separated option, of which every name must be known.

    >>> chosen(parser(None, 3), "--sets", "b,a", ["a", "b"])
    ['b', 'a']
    """
    names = value.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"{option}: unknown {sorted(unknown)}; known are {', '.join(known)}")
    return names


def show(about: Mapping[str, object], legend: str) -> None:
    """What stands above the tables."""
    print("\n".join(f"{key}: {value}" for key, value in about.items()), "\n", flush=True)
    print(legend, "\n", flush=True)


class Shown:
    """Tables that are printed as they come, and kept for the JSON."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []

    def add(self, out: Table) -> None:
        """Prints a table, and keeps its figures and the load after it."""
        self.figures.append(out.figures() | {"load": load()})
        print(out.text(), "\n", flush=True)


def write(
    file: Path | None, about: Mapping[str, object], tables: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the figures, if a file was asked for."""
    if file is None:
        return
    found = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": {**about, "load_after": load()},
        "tables": list(tables),
    }
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def load() -> float | None:
    """The average load of the last minute, where the system tells it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
