"""What averaging checkpoints costs, in ratios to reading the same files with ``cat``.

    python benchmarks/checkpoint_average.py [--number 20] [--megabytes 500] [--json FILE] [--quick]

Every contender is a process of its own, started anew in each round and in turn with the others; the
files are in the page cache. Timed is what it does after it has imported what it needs; that start
is shown beside it. Results go to the disk that the checkpoints are on; ours alone wait until they
are there (fsync). After the timing every result is compared with the mean in float64.

In a round of its own the memory is watched: anonymous and mapped, together and apart. The files
take number x megabytes in a temporary folder, of one dtype at a time, and as much of the page
cache. mergekit, which needs versions of its own, is taken from --mergekit PYTHON, the Python of an
environment that has it, or from this one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoint_sets
import command
import machine
from checkpoint_contenders import CONTENDERS
from timing import Table

WORKER = Path(__file__).with_name("checkpoint_contenders.py")
FLOOR = "cat of the same files"
OURS = ("swa average --no-hash", "swa average")
MERGEKIT = "mergekit, linear"
PACKAGES = ("numpy", "safetensors", "torch")
LEGEND = """\
x: ratio to cat, median and quartiles of the rounds; fastest: that of the fastest rounds, which
other work disturbs the least. start: seconds of importing, not in the others. beyond: the most
memory, anonymous and mapped, over what was there after importing; anon, mapped: each at its most.
MB are 10**6 bytes. error: the largest, relative, to float64."""


@dataclass
class Figures:
    """What runs of a contender gave.

    Attributes:
      seconds: of each round.
      start: seconds of importing, by round.
      memory: MB, from the round that was not timed: "beyond", "anon" and "mapped".
    """

    seconds: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)


class Bench:
    """Checkpoints of one dtype, and who averages them."""

    def __init__(self, folder: Path, paths: list[Path], dtype: str, mergekit: str | None) -> None:
        self.folder = folder
        self.paths = paths
        self.dtype = dtype
        self.mergekit = mergekit

    def absent(self) -> dict[str, str]:
        """Who cannot run, and why."""
        found = {}
        if self.dtype == "bfloat16":
            found["load all, numpy mean"] = "numpy has no bfloat16"
        if self.mergekit is None:
            found[MERGEKIT] = "NOT INSTALLED (--mergekit PYTHON, of an environment that has it)"
        whole = sum(path.stat().st_size for path in self.paths)
        free = machine.free_memory()
        if free is not None and 2.05 * whole > free:
            found["load all, numpy mean"] = (
                f"takes {whole / 1e9:.0f} GB beside the page cache, and of both "
                f"{free / 1e9:.0f} are there"
            )
        if shutil.which("cat") is None:
            found[FLOOR] = "this machine has no cat"
        return found

    def result(self, name: str) -> Path:
        """Where a contender puts its result."""
        plain = "".join(letter for letter in name if letter.isalnum())
        return self.folder / (plain if name == MERGEKIT else f"{plain}.safetensors")

    def command(self, name: str) -> list[str]:
        files = [str(path) for path in self.paths]
        if name == FLOOR:
            return ["sh", "-c", f"cat {shlex.join(files)} > /dev/null"]
        python = self.mergekit if name == MERGEKIT and self.mergekit else sys.executable
        return [python, str(WORKER), name, str(self.result(name)), *files]

    def run(self, name: str, *, watch: bool = False) -> dict[str, Any]:
        """Runs a contender once; with ``watch`` it is asked for its memory all the time.

        Raises:
          RuntimeError: it failed, with what it said.
        """
        begin, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            self.command(name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watched: dict[str, float] = {}
        watcher = threading.Thread(target=_watch, args=(process, watched))
        if watch:
            watcher.start()
        out, err = process.communicate()
        seconds = time.perf_counter() - clock
        if watch:
            watcher.join()
        if process.returncode:
            raise RuntimeError(f"{name} failed:\n{err[-2000:]}")
        if name == FLOOR:
            return {"seconds": seconds, "start": 0.0, **watched}
        said = json.loads(out.splitlines()[-1])
        if said["peak"] is not None:
            watched["beyond"] = (said["peak"] - said["before"]) * 1024 / 1e6
        return {"seconds": said["seconds"], "start": said["imported"] - begin, **watched}

    def warm(self) -> None:
        """Reads the files: who takes much memory may have driven them out of the page cache."""
        block = bytearray(1 << 20)
        for path in self.paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass

    def error(self, name: str) -> float:
        """How far off a contender's result is; of one that sums in float32 it is checked."""
        result = self.result(name)
        if result.is_dir():
            result = result / "model.safetensors"
        found = checkpoint_sets.error(result, self.paths)
        if self.dtype == "float32" or name in (*OURS, MERGEKIT):
            limit = checkpoint_sets.TOLERANCE[self.dtype]
            assert found <= limit, f"{name}: the mean is off by {found:.1e}"
        return found

    def measure(self, names: list[str], rounds: int, known: dict[str, float]) -> Table:
        """Runs contenders in turn, after a round in which their memory is watched."""
        figures = {name: Figures() for name in names}
        for number in range(rounds + 1):
            for name, figure in figures.items():
                self.warm()
                found = self.run(name, watch=not number)
                if number:
                    figure.seconds.append(found["seconds"])
                    figure.start.append(found["start"])
                else:
                    keys = ("beyond", "anon", "mapped")
                    figure.memory = {key: found[key] for key in keys if key in found}
        whole = sum(path.stat().st_size for path in self.paths)
        title = f"{len(self.paths)} checkpoints of {whole / len(self.paths) / 1e6:.0f} MB"
        times = {name: figure.seconds for name, figure in figures.items()}
        absent = {who: why for who, why in self.absent().items() if who not in OURS}
        everybody = set(names) > {FLOOR, *OURS}
        of = self.dtype if everybody else f"{self.dtype}, ours alone"
        out = Table(
            f"{title} in {self.dtype}",
            times,
            FLOOR if FLOOR in times else None,
            absent=absent,
            about={"kind": "checkpoints", "of": of, "MB": whole / len(self.paths) / 1e6},
        )
        out.column("fastest", out.fastest(), "{:.2f}")
        means = [name for name in names if name != FLOOR]
        out.column("start", {name: min(figures[name].start) for name in means}, "{:.2f}")
        for key in ("beyond", "anon", "mapped"):
            values = {
                n: f.memory[key] for n, f in figures.items() if n in means and key in f.memory
            }
            out.column(key, values, "{:.0f}")
        for name in means:
            if name not in known:
                known[name] = self.error(name)
        out.column("error", {name: known[name] for name in means}, "{:.0e}")
        medians = out.medians()
        out.column("GB/s", {name: whole / medians[name] / 1e9 for name in names}, "{:.1f}")
        return out


def _watch(process: subprocess.Popen[str], most: dict[str, float]) -> None:
    """Asks the kernel for the memory of a process until it ends; MB at the most."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for field_, key in (("RssAnon", "anon"), ("RssFile", "mapped")):
            for line in lines:
                if line.startswith(f"{field_}:"):
                    most[key] = max(most.get(key, 0.0), int(line.split()[1]) * 1024 / 1e6)
        time.sleep(0.01)


def python_with_mergekit(chosen: str | None) -> str | None:
    """The Python that has mergekit: the one that was named, or this one."""
    python = chosen or sys.executable
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('mergekit') is None)"
    return python if subprocess.run([python, "-c", probe]).returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--number", type=int, default=20, help="of checkpoints (default: 20)")
    add("--megabytes", type=float, default=500, help="of each (default: 500)")
    add("--dtypes", help="comma-separated (default: both; of the quick run, float32)")
    add("--rounds", type=int, default=5, help="of ours and the floor (default: 5)")
    add("--slow-rounds", type=int, default=2, help="of all others too (default: 2)")
    add("--folder", type=Path, help="where the files are put for the time (default: the system's)")
    add("--mergekit", metavar="PYTHON", help="a Python that has mergekit")
    add("--json", type=Path, metavar="FILE", help="where to write all figures")
    add("--quick", action="store_true", help="3 small files, 2 rounds: whether all runs")
    options = parser.parse_args()
    chosen = options.dtypes or ("float32" if options.quick else "float32,bfloat16")
    dtypes = chosen.split(",")
    if unknown := set(dtypes) - checkpoint_sets.DTYPES.keys():
        parser.error(f"--dtypes: unknown {sorted(unknown)}")
    if options.quick:
        options.number, options.megabytes = 3, 20
        options.rounds = options.slow_rounds = 2
    if min(options.number, options.rounds - 1, options.slow_rounds - 1) < 1:
        parser.error("at least one checkpoint, and two rounds, are needed")

    # Else the files would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    about = machine.description(list(PACKAGES))
    command.show(about, LEGEND)
    mergekit = python_with_mergekit(options.mergekit)
    tables = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            paths = checkpoint_sets.make(
                Path(folder), options.number, int(options.megabytes * 1e6), dtype
            )
            bench = Bench(Path(folder), paths, dtype, mergekit)
            absent = bench.absent()
            # In the quick run everybody's table is all.
            near = [name for name in (FLOOR, *OURS) if name not in absent]
            everybody = [name for name in (FLOOR, *CONTENDERS) if name not in absent]
            known: dict[str, float] = {}
            sets = ((near, options.rounds), (everybody, options.slow_rounds))
            for names, rounds in sets[1 if options.quick else 0 :]:
                tables.append(bench.measure(names, rounds, known))
                print(tables[-1].text(), "\n", flush=True)
    command.write(options.json, about, [table.figures() for table in tables])


if __name__ == "__main__":
    main()
