"""Accelerate on two processes: the same average on both, saved and loaded there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of all checks, and what the processes said. One launch: its imports take long."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, HERE / "accelerate_on_ranks.py", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return folder, done.stderr


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_train_save_and_resume(kind, launched):
    folder, said = launched
    assert (folder / kind / "passed").exists(), said
