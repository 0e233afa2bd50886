"""A training that is killed at random moments ends as if nobody had killed it, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",  # with another number, sums are taken in another order
    "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
}
# 110 updates, the first snapshot at 88.
EPOCHS = 5


class Server:
    """Starts the example in new processes at the cost of a fork."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "forking.py"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"
        self.child = None

    def start(self, folder, optimizer):
        """Starts a process; what it prints is added to a file in the folder."""
        if self.child is not None:  # a test has failed
            self.kill()
            self.wait()
        (folder / "output.txt.ended").unlink(missing_ok=True)
        arguments = [f"--checkpoint={folder / 'checkpoint.pt'}", f"--epochs={EPOCHS}"]
        request = {
            "arguments": [*arguments, "--save-every=1"],
            "optimizer": optimizer,
            "output": str(folder / "output.txt"),
        }
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
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def version(path):
    """Which version of a file is there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def wait_until(condition, folder, pause):
    """Looks until something has happened, or the process has ended by itself."""
    ended, patience = folder / "output.txt.ended", time.monotonic() + 120
    while not condition() and not ended.exists():
        assert time.monotonic() < patience, (folder / "output.txt").read_text()
        time.sleep(pause)


def await_moment(folder, chance, in_the_writing):
    """Waits for some more checkpoints, and then for any moment, or until one is being written."""
    checkpoint, partial = folder / "checkpoint.pt", folder / "checkpoint.pt.partial"
    for _ in range(chance.randint(1, 6)):
        before = version(checkpoint)
        wait_until(lambda before=before: version(checkpoint) != before, folder, pause=0.0005)
    if in_the_writing:
        before = version(partial)
        wait_until(lambda: version(partial) not in (None, before), folder, pause=0)
    else:
        time.sleep(chance.uniform(0, 0.005))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_killed_at_random_moments_it_ends_as_the_uninterrupted_run(optimizer, server, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    server.start(whole, optimizer)
    assert server.wait() == 0, (whole / "output.txt").read_text()

    chance = random.Random(optimizer)
    ends, torn = [], 0
    while not ends or ends[-1] != 0:
        server.start(killed, optimizer)
        await_moment(killed, chance, in_the_writing=len(ends) % 2 == 0)
        server.kill()
        ends.append(server.wait())
        assert ends[-1] in (0, -signal.SIGKILL), (killed / "output.txt").read_text()
        torn += (killed / "checkpoint.pt.partial").exists()

    assert len(ends) > 10
    assert torn >= 3
    output = (killed / "output.txt").read_text().splitlines()
    assert output[-1] == (whole / "output.txt").read_text().splitlines()[-1]
    assert f"{EPOCHS * 22} updates, 2 snapshots" in output[-1]
    ended, resumed = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, killed))
    assert leaves(ended) == leaves(resumed)
    if optimizer == "sgd":
        assert output[-1] == as_a_command(killed)


def leaves(tree):
    """Everything in a checkpoint, with the bytes of tensors."""
    if isinstance(tree, dict):
        return {key: leaves(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [leaves(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()
    return tree


def as_a_command(folder):
    """The last line of the example if it is started as its first lines say."""
    done = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "resume_torch.py"),
            *("--checkpoint", folder / "checkpoint.pt", "--epochs", str(EPOCHS)),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]
