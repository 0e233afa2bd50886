"""Every command of the evidence runs, from end to end on tiny sizes, and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What each is called with, and what it leaves in the folder it is run in.
COMMANDS = {
    "experiment": (
        ["cifar10", "--cache", "cache", "--results", ".", "--docs", "."],
        ["averaging-cifar10.json", "averaging-cifar10.md", "averaging-cifar10.png"],
    ),
    "landscape": (
        ["cifar10", "--cache", "cache", "--results", ".", "--docs", "."],
        ["landscape-cifar10.json", "landscape-cifar10.md", "landscape-cifar10.png"],
    ),
    "start_and_every": (
        ["--cache", "cache", "--out", "."],
        ["start_and_every-digits.json", "start-and-every.md", "start-and-every-digits.png"],
    ),
    "language_model": (
        ["--cache", "cache", "--out", ".", "--docs", "."],
        ["language_model.json", "language-model.md", "language-model.png"],
    ),
    "correctness": (
        ["--json", "correctness.json", "--markdown", "correctness.md"],
        ["correctness.json", "correctness.md"],
    ),
    # Of one framework: those of the others are run in quick form by their own adapters' tests.
    "speed": (
        ["--only", "torch", "--growth", "--run", "run", "--results", ".", "--page", "speed.md"],
        ["speed.md", "speed-growth.png"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs(name, tmp_path):
    arguments, left = COMMANDS[name]
    root = BENCHMARKS.parent
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # Frameworks as a user has them: one process each, the default backend of Keras.
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'adapters'}"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for file in left:
        path = tmp_path / file
        assert path.stat().st_size > 200, file
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    # Where a run was quick, its page says so: its figures are none.
    (page,) = (tmp_path / file for file in left if file.endswith(".md"))
    assert "quick" in page.read_text(encoding="utf-8")
