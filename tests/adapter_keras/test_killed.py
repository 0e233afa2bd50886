"""A ``fit`` that is killed at random moments ends as if nobody had killed it, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("SWA_KILLS", "3"))  # more of them, by hand


class Server:
    """Starts the training in new processes at the cost of a fork."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "training_to_kill.py"],
            env={
                **os.environ,
                "KERAS_BACKEND": keras.backend.backend(),
                "OMP_NUM_THREADS": "1",  # with another number, sums are taken in another order
                "PYTHONPATH": os.pathsep.join(sys.path),
                "PYTHONWARNINGS": "ignore",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"
        self.child = None

    def start(self, folder):
        """Starts a process; what it prints is added to a file in the folder."""
        (folder / "output.txt.ended").unlink(missing_ok=True)
        request = {"backup": str(folder / "backup"), "output": str(folder / "output.txt")}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        self.child = int(self.process.stdout.readline())

    def kill(self):
        """SIGKILL; until ``wait`` the id is the child's, whether it runs or has ended."""
        os.kill(self.child, signal.SIGKILL)

    def wait(self):
        """How the process ended, as ``os.waitstatus_to_exitcode`` has it."""
        print(file=self.process.stdin, flush=True)
        self.child = None
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self):
        if self.child is not None:  # a test has failed
            self.kill()
            self.wait()
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def found(folder, kind):
    """The names in the folder of backups that begin so."""
    try:
        return {name for name in os.listdir(folder / "backup") if name.startswith(kind)}
    except FileNotFoundError:
        return set()


def await_change(folder, kind):
    """Looks until something new of a kind is there, or the process has ended by itself."""
    before, patience = found(folder, kind), time.monotonic() + 240
    while not found(folder, kind) - before and not (folder / "output.txt.ended").exists():
        assert time.monotonic() < patience, (folder / "output.txt").read_text()
        time.sleep(0.0002)


def test_killed_at_random_moments_it_ends_as_the_uninterrupted_run(server, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    server.start(whole)
    assert server.wait() == 0, (whole / "output.txt").read_text()

    chance = random.Random(KILLS)
    for number in range(KILLS):
        server.start(killed)
        for _ in range(chance.randint(1, 2)):
            await_change(killed, "backup-")
        if number % 2:  # in the midst of writing, as a rule
            await_change(killed, ".partial-")
        time.sleep(chance.uniform(0, 0.01))
        server.kill()
        assert server.wait() == -signal.SIGKILL, (killed / "output.txt").read_text()
        assert found(killed, "backup-")
    server.start(killed)
    assert server.wait() == 0, (killed / "output.txt").read_text()

    assert (killed / "output.txt").read_text() == (whole / "output.txt").read_text()
    assert '"n_updates": 56' in (whole / "output.txt").read_text()
    assert not (killed / "backup").exists()
