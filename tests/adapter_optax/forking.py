"""Trains and saves with Orbax, again and again, each time in a new process, at the cost of a fork.

Reads a line for each start, the folder of the checkpoints, and answers with the child's id; then
another line, upon which it waits for the child's end and answers with its status. (Until then the
id is nobody else's.) Nothing is computed here: the threads of JAX would not survive the fork.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
from adapter_optax.interrupting import functions, inputs

NAME, UPDATES = "inject_hyperparams", 36


def train(folder: str) -> None:
    """From the latest checkpoint, or the beginning; a checkpoint after every update."""
    init, step, _ = functions(NAME)
    numbers, bad = inputs(UPDATES)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        begin = manager.latest_step() or 0
        stage = init(seed=1 if begin else 0)
        if begin:
            stage = manager.restore(begin, args=ocp.args.StandardRestore(stage))
        for update in range(begin, UPDATES):
            stage = step(stage, (numbers[update], bad[update]))
            manager.save(update + 1, args=ocp.args.StandardSave(stage))


def child(folder: str) -> None:
    status = 1
    try:
        train(folder)
        status = 0
    except BaseException:
        Path(f"{folder}.error").write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(status)


def main() -> None:
    # JAX warns of every fork; here it has not started a thread yet.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        process = os.fork()
        if not process:
            child(line.strip())
        print(process, flush=True)
        sys.stdin.readline()
        print(os.waitpid(process, 0)[1], flush=True)


if __name__ == "__main__":
    main()
