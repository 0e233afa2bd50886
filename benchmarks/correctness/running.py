"""Each family in a process of its own: frameworks do not mix well, and a crash is an answer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from correctness.cells import Cell
from correctness.registry import Family

LIMIT = 3600.0  # seconds for a family


@dataclass
class Row:
    """A peer's answers.

    Attributes:
      peer: its name.
      family: the process it ran in.
      cells: the answers by the titles of their questions.
    """

    peer: str
    family: str
    cells: dict[str, Cell] = field(default_factory=dict)


def missing(family: Family) -> str | None:
    """Why a family cannot run here, or None."""
    for package, module in zip(family.packages, family.imports, strict=True):
        if importlib.util.find_spec(module) is None:
            return f"not installed: {package}"
    return None


def ask(
    families: Iterable[Family], snapshots: int, jobs: int, *, quick: bool
) -> Iterator[tuple[Family, Any]]:
    """The rows of each family as soon as they are there, or the words why there are none.

    Args:
      families: who is asked.
      snapshots: how many the long trainings have.
      jobs: how many processes at once.
      quick: whether slow families are asked few questions.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(ask_one, family, snapshots, quick=quick): family for family in families
        }
        for done in as_completed(running):
            yield running[done], done.result()


def ask_one(family: Family, snapshots: int, *, quick: bool = False) -> list[Row] | str:
    """The rows of a family, or why there are none.

    A process that dies leaves the question it was at; the next process begins behind it.
    """
    if (why := missing(family)) is not None:
        return why
    options = ["--snapshots", str(snapshots), *(["--quick"] if quick else [])]
    deadline = time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        rows: dict[str, Row] = {}
        answered = 0
        while True:
            file.unlink(missing_ok=True)
            died = _run(
                family, file, [*options, "--skip", str(answered)], deadline - time.monotonic()
            )
            number, pending, finished = _read(file, family, rows)
            answered += number
            if finished:
                return list(rows.values())
            if pending is None:
                return f"cannot be run: {died}"
            rows[pending["peer"]].cells[pending["question"]] = Cell(
                f"process ended: {died}", right=False, kind="crashed"
            )
            answered += 1


def _run(family: Family, file: Path, options: list[str], limit: float) -> str:
    """Runs the process to its end; the last words of one that failed."""
    command = [sys.executable, "-m", "correctness.child", family.name, str(file)]
    here = [str(Path(__file__).parents[1]), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in here if path),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **family.environment,
    }
    try:
        done = subprocess.run(
            [*command, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(limit, 1.0),
        )
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT:.0f} s"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _read(
    file: Path, family: Family, rows: dict[str, Row]
) -> tuple[int, dict[str, str] | None, bool]:
    """Adds the answers of a process to ``rows``: their number, the open question, whether all."""
    number, pending = 0, None
    for line in file.read_text().splitlines() if file.exists() else []:
        entry = json.loads(line)
        if "done" in entry:
            return number, None, True
        if "peer" in entry:
            pending = entry
            rows.setdefault(entry["peer"], Row(entry["peer"], family.name))
        else:
            rows[pending["peer"]].cells[pending["question"]] = Cell(**entry["cell"])
            number, pending = number + 1, None
    return number, pending, False
