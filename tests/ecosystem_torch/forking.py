"""Starts the example again and again, each time in a new process, at the cost of a fork.

Reads a line of JSON for each start, ``{"arguments": [...], "optimizer": NAME, "output": FILE}``,
and answers with the child's id; then another line, upon which it waits for the child's end and
answers with its status. (Until then the id is nobody else's.) Nothing is computed here: the threads
of torch would not survive the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import data
import resume_torch
import torch

OPTIMIZERS = {
    "sgd": resume_torch.inner_optimizer,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def run(arguments: list[str], optimizer: str, output: str) -> None:
    """The child: what it prints goes to the file; one beside it tells that it came to its end."""
    resume_torch.inner_optimizer = OPTIMIZERS[optimizer]
    status = 1
    with open(output, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            warnings.simplefilter("error")
            resume_torch.main(arguments)
            status = 0
        except BaseException:
            traceback.print_exc(file=file)
    Path(f"{output}.ended").touch()
    os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    digits = data.load("digits")
    resume_torch.load = lambda name: digits
    # The first optimizer of a process imports half of torch.
    resume_torch.inner_optimizer(torch.nn.Linear(1, 1))
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            run(**json.loads(line))
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
