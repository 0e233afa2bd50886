"""The command asks the core, says who is absent, and survives who crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import correctness
from correctness import running
from correctness.questions import PARTS
from correctness.registry import FAMILIES, by_name
from correctness.tables import as_markdown, for_terminal

SCRIPT = Path(correctness.__file__).parent.with_suffix(".py")
TITLES = [question.title for part in PARTS for question in part.questions]


def test_quick_asks_the_core(tmp_path):
    paths = [str(SCRIPT.parent), *sys.path]
    options = ["--quick", "--only", "swa_core", "--json", "a.json", "--markdown", "docs/a.md"]
    how = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        "capture_output": True,
        "text": True,
    }
    done = subprocess.run([sys.executable, str(SCRIPT), *options], **how)
    assert done.returncode == 0, done.stderr
    assert "swa_core: asked" in done.stderr
    again = subprocess.run([sys.executable, str(SCRIPT), *options, "--keep"], **how)
    assert (again.stdout, again.stderr) == (done.stdout, "")  # kept, so nobody is asked
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["command"].startswith("benchmarks/correctness.py --quick")
    assert found["machine"]["versions"]["numpy"]
    (row,) = found["rows"]
    assert list(row["cells"]) == TITLES
    # The core hands out initial weights before the first snapshot, and says so.
    wrong = [title for title, cell in row["cells"].items() if cell["right"] is False]
    assert wrong == ["before the first snapshot"]
    page = (tmp_path / "docs" / "a.md").read_text()
    for title in TITLES:
        assert f"*{title}*: " in page
    assert done.stdout.strip() == for_terminal(found).strip()
    assert "**the initial weights**" in as_markdown(found)


def test_who_is_not_installed_is_named():
    absent = replace(by_name("torch-ema"), imports=("no_such_package",))
    assert running.ask_one(absent, 10) == "not installed: torch-ema"


def test_who_cannot_be_imported_is_named():
    broken = replace(by_name("swa_core"), environment={"PYTHONHASHSEED": "no number"})
    assert running.ask_one(broken, 10).startswith("cannot be run: ")


def test_a_crash_is_an_answer_and_the_others_follow(tmp_path, monkeypatch):
    entries = iter(
        [
            [
                {"peer": "it", "question": "a"},
                {"cell": {"text": "x"}},
                {"peer": "it", "question": "b"},
            ],
            [{"peer": "it", "question": "c"}, {"cell": {"text": "y"}}, {"done": 3}],
        ]
    )
    skips = []

    def run(family, file, options, limit):
        skips.append(options[-1])
        file.write_text("".join(f"{json.dumps(entry)}\n" for entry in next(entries)))
        return "signal 11"

    monkeypatch.setattr(running, "_run", run)
    (row,) = running.ask_one(by_name("swa_core"), 10)
    assert skips == ["0", "2"]
    assert {title: cell.text for title, cell in row.cells.items()} == {
        "a": "x",
        "b": "process ended: signal 11",
        "c": "y",
    }
    assert row.cells["b"].kind == "crashed"


def test_every_family_has_its_file():
    peers = Path(correctness.__file__).parent / "peers"
    files = {file.stem for file in peers.glob("*.py")} - {"__init__"}
    assert {family.module for family in FAMILIES} == files
