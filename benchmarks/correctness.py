"""Is the average right? Ours and every peer on the same scripted trainings: ``--help`` says how.

Prints a table whose cells are numbers or observed behaviours, each from running the real package in
a process of its own. ``--only`` names families: see ``correctness/registry.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from correctness.cells import Cell
from correctness.questions import PARTS
from correctness.registry import ALSO, FAMILIES, QUICK, Family
from correctness.running import Row, ask
from correctness.tables import as_markdown, for_terminal

SNAPSHOTS, QUICK_SNAPSHOTS = 10_000, 30


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    chosen = [
        family
        for family in FAMILIES
        if (family.name in given.only if given.only else not given.quick or family.name in QUICK)
    ]
    snapshots = QUICK_SNAPSHOTS if given.quick else SNAPSHOTS
    conditions = conditions_of(snapshots, quick=given.quick)
    found = kept(given.json, conditions) if given.keep else {}
    absent: dict[str, str] = {}
    # Who answers at once comes first.
    open_ = sorted((it for it in chosen if it.name not in found), key=lambda family: family.slow)
    results = collected(chosen, found, absent, conditions)
    for family, rows in ask(open_, snapshots, given.jobs, quick=given.quick):
        print(f"{family.name}: {rows if isinstance(rows, str) else 'asked'}", file=sys.stderr)
        if isinstance(rows, str):
            absent[family.name] = rows
        else:
            found[family.name] = rows
        results = collected(chosen, found, absent, conditions)
        write(results, given)  # each time: a run that is stopped leaves what it had
    print(for_terminal(results))


def conditions_of(snapshots: int, *, quick: bool) -> dict[str, Any]:
    """What answers depend on: they are kept where all of it is the same."""
    files = sorted((Path(__file__).parent / "correctness").rglob("*.py"))
    source = b"".join(file.read_bytes() for file in files)
    packages = sorted({package for family in FAMILIES for package in family.packages} | set(ALSO))
    return {
        "snapshots": snapshots,
        "quick": quick,
        "source": hashlib.sha256(source).hexdigest()[:16],
        "machine": machine.description(packages),
    }


def kept(file: Path | None, conditions: dict[str, Any]) -> dict[str, list[Row]]:
    """The answers of an earlier run under the same conditions, by family."""
    if file is None or not file.exists():
        return {}
    before = json.loads(file.read_text())
    same = all(before.get(name) == conditions[name] for name in ("snapshots", "quick", "source"))
    if not same or before["machine"]["versions"] != conditions["machine"]["versions"]:
        print(f"{file} is of another code or other versions: all are asked", file=sys.stderr)
        return {}
    found: dict[str, list[Row]] = {}
    for row in before["rows"]:
        cells = {title: Cell(**cell) for title, cell in row["cells"].items()}
        found.setdefault(row["family"], []).append(Row(row["peer"], row["family"], cells))
    return found


def write(results: dict[str, Any], given: argparse.Namespace) -> None:
    """Into the files that are asked for."""
    for file, text in (
        (given.json, json.dumps(results, indent=1) + "\n"),
        (given.markdown, as_markdown(results)),
    ):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few snapshots, Keras on jax alone, few questions to slow peers",
    )
    parser.add_argument("--json", type=Path, help="where to write the answers")
    parser.add_argument("--markdown", type=Path, help="where to write the page")
    parser.add_argument(
        "--only",
        action="append",
        choices=[family.name for family in FAMILIES],
        metavar="PEER",
        help="ask this one alone; may be given again: "
        + ", ".join(family.name for family in FAMILIES),
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the answers that the file of --json has under the same conditions",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default: 1)")
    return parser.parse_args(arguments)


def collected(
    chosen: list[Family],
    found: dict[str, list[Row]],
    absent: dict[str, str],
    conditions: dict[str, Any],
) -> dict[str, Any]:
    """All of it as JSON has it, rows in the order of the families."""
    waiting = [it.name for it in chosen if it.name not in found and it.name not in absent]
    return {
        "command": " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        **conditions,
        "parts": [
            {
                "title": part.title,
                "questions": [{"title": it.title, "asks": it.asks} for it in part.questions],
            }
            for part in PARTS
        ],
        "rows": [
            {
                **asdict(row),
                "cells": {title: cell._asdict() for title, cell in row.cells.items()},
            }
            for family in chosen
            for row in found.get(family.name, [])
        ],
        "absent": absent | dict.fromkeys(waiting, "not asked yet: the run was stopped"),
    }


if __name__ == "__main__":
    main()
