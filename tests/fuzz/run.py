"""Thousands of mutated checkpoints of every kind: each is read, or refused with an error of ours.

    python -m nox -s fuzz                       # all kinds, three minutes on two quiet cores
    python -m nox -s fuzz -- --count 20000      # more of each
    python -m nox -s fuzz -- --formats .npz --first 1234 --count 1    # one again

Files are read in processes with a limit of memory and of time. A crash, a hang, an error of
another kind, too much memory, or files that are left behind are faults. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fuzz.formats import FORMATS

TESTS = Path(__file__).parents[1]
LIMIT = 20.0  # seconds for one file
WORKER = ("-m", "fuzz.worker")


class Result(NamedTuple):
    """How the files of one kind went.

    Attributes:
      name: of the kind.
      files: how many there were.
      refused: with an error of ours, or of a file that is not there.
      read: as another checkpoint.
      slowest: of them [s].
      peak: the most memory that one took beyond what the process holds at rest [bytes].
      faults: by the number of the file.
    """

    name: str
    files: int
    refused: int
    read: int
    slowest: float
    peak: int
    faults: dict[int, str]


def fuzz(
    name: str, first: int, count: int, worker: Sequence[str] = WORKER, limit: float = LIMIT
) -> Result:
    """Reads the mutated files of a kind, with new processes after one that crashed or hung.

    Args:
      name: of the kind.
      first: number of the first file.
      count: of files.
      worker: the process that reads them.
      limit: for one file [s].
    """
    refused = read = 0
    slowest, peak, done = 0.0, 0, first
    faults: dict[int, str] = {}
    end = first + count
    while done < end:
        begun = False
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *worker, name, str(done), str(end)],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                text=True,
            )
            lines: queue.Queue[str] = queue.Queue()
            collecting = threading.Thread(target=_collect, args=(process, lines), daemon=True)
            collecting.start()
            try:
                # What is imported first may take long.
                while line := lines.get(timeout=limit if begun else 300):
                    said = json.loads(line)
                    begun = True
                    if said["seed"] < 0:
                        continue
                    done = said["seed"] + 1
                    refused += said["went"] == "refused"
                    read += said["went"] == "read"
                    slowest, peak = max(slowest, said["seconds"]), max(peak, said["peak"])
                    if said["fault"]:
                        faults[said["seed"]] = said["fault"]
                how = f"exit status {process.wait(limit)}"
            except (queue.Empty, subprocess.TimeoutExpired):
                how = f"no answer within {limit} s"
            process.kill()
            process.wait()
            collecting.join()
            errors.seek(0)
            told = errors.read()[-3000:]
        if not begun:
            raise RuntimeError(f"{name}: the process did not begin:\n{told}")
        if done < end:
            faults[done] = f"{how}\n{told}"
            done += 1
    return Result(name, count, refused, read, slowest, peak, faults)


def _collect(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Hands on what a process prints, and at its end an empty line."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put("")


def _environment() -> dict[str, str]:
    root = TESTS.parent
    paths = [str(TESTS), str(root), str(root / "adapters"), os.environ.get("PYTHONPATH", "")]
    return {
        "KERAS_BACKEND": "jax",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        # With more threads, addresses are reserved that the limit would count.
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }


def table(results: Sequence[Result]) -> str:
    """For people, and for the page of the documentation."""
    lines = ["| format | files | refused | read | slowest | memory | faults |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r.name} | {r.files} | {r.refused} | {r.read} | {r.slowest:.2f} s | "
        f"{r.peak / 1e6:.0f} MB | {len(r.faults)} |"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes; the exit status is 1 if there was a fault."""
    names = [form.name for form in FORMATS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="files of each kind")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    begin = time.monotonic()

    def one(name: str) -> Result:
        result = fuzz(name, options.first, options.count)
        print(f"{name}: {len(result.faults)} faults", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(options.workers) as pool:
        results = [*pool.map(one, options.formats)]
    print(table(results))
    print(f"\n{time.monotonic() - begin:.0f} s with {options.workers} processes at a time")
    for result in results:
        for seed, fault in [*result.faults.items()][:5]:
            print(f"\n{result.name}, file {seed}: {fault}")
    return 1 if any(result.faults for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
