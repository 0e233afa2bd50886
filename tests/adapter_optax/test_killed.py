"""A training that saves with Orbax and is killed at random moments ends as if nobody had."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from adapter_optax.forking import NAME, UPDATES
from adapter_optax.interrupting import functions, same_bits, uninterrupted

from swa_optax import n_averaged, n_skipped

KILLS = 3


@pytest.fixture
def server():
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forking.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    assert process.wait() == 0
    process.stdout.close()


def start(server, folder):
    print(folder, file=server.stdin, flush=True)
    return int(server.stdout.readline())


def end(server):
    print(file=server.stdin, flush=True)
    return os.waitstatus_to_exitcode(int(server.stdout.readline()))


def latest(folder):
    """The latest update that Orbax has saved: a folder gets its name when all is in it."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def wait_for(update, folder):
    patience = time.monotonic() + 120
    error = folder.with_suffix(".error")
    while latest(folder) < update:
        assert not error.exists(), error.read_text(encoding="utf-8")
        assert time.monotonic() < patience
        time.sleep(0.001)


def test_killed_at_random_moments_it_ends_as_the_uninterrupted_run(server, tmp_path, relaxed_jax):
    chance, folder = random.Random(), tmp_path / "checkpoints"
    folder.mkdir()
    ends = []
    while ends.count(-signal.SIGKILL) < KILLS and 0 not in ends:
        process = start(server, folder)
        try:
            wait_for(latest(folder) + chance.randint(1, UPDATES // KILLS - 5), folder)
            time.sleep(chance.uniform(0, 0.03))
        finally:
            os.kill(process, signal.SIGKILL)
            ends.append(end(server))
        # Where this process hardly runs, the other may come to its end meanwhile.
        assert ends[-1] in (0, -signal.SIGKILL), folder.with_suffix(".error").read_text("utf-8")
    assert -signal.SIGKILL in ends
    start(server, folder)
    assert end(server) == 0, folder.with_suffix(".error").read_text(encoding="utf-8")

    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == UPDATES
        target = functions(NAME)[0](seed=1)
        stage = manager.restore(UPDATES, args=ocp.args.StandardRestore(target))
    same_bits(stage, uninterrupted(NAME, UPDATES))
    assert n_averaged(stage.state) > 10
    assert n_skipped(stage.state) > 1
