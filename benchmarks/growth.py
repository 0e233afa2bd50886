"""How long a snapshot takes that is larger, or that has more tensors.

    python benchmarks/growth.py torch|keras|optax [--rounds 7] [--json FILE] [--quick]

From 1 M to 500 M float32 weights in 100 tensors, and from 10 to 10 000 tensors of 10 M weights in
all; Keras on the backend that KERAS_BACKEND names. All contenders stand beside each other and run
in turn, so the largest size takes up to 20 GB: what there is no memory for is left out, and what
would take longer than a few minutes to compile, each with its reason. Weights change before each
round, and averages are compared with float64 after the timing.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ceiling
import command
import machine
import numpy as np
from timing import Table, interleaved

FRAMEWORKS = ("torch", "keras", "optax")
MILLION = 10**6
# Of each axis: what grows, and what stays.
SIZES = [n * MILLION for n in (1, 3, 10, 30, 100, 200, 500)]
TENSORS = 100
COUNTS = [10, 30, 100, 300, 1000, 3000, 10_000]
WEIGHTS = 10 * MILLION
# A size is left out if its first calls would take longer than this, going by the one before [s].
PATIENCE = 120.0
# Of the memory that is free, what may be asked for.
SHARE_OF_MEMORY = 0.85
TOLERANCE = 1e-6


class Beside(NamedTuple):
    """Contenders that average the same weights.

    Attributes:
      updates: takes the weights in, by contender.
      move: the next weights.
      errors: relative to float64, by contender.
      absent: who is not among them, and why.
    """

    updates: Mapping[str, Callable[[], object]]
    move: Callable[[], object]
    errors: Callable[[], Mapping[str, float]]
    absent: Mapping[str, str]


@dataclass
class Grown:
    """One axis.

    Attributes:
      grows: "weights" or "tensors".
      fixed: how many there are of the other.
      tables: of each size, its figures.
      left_out: sizes that were not measured, and why.
    """

    grows: str
    fixed: int
    tables: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)


def too_large(copies: int, n_weights: int, free: int | None) -> str | None:
    """Why a size is left out: it needs so many float32 copies of its weights.

    >>> too_large(10, 500 * MILLION, 23 * 10**9)
    'takes 20 GB, and of 23 GB free no more than 85 % is used'
    >>> too_large(9, 500 * MILLION, 23 * 10**9)
    """
    needed = 4 * copies * n_weights
    if free is None or needed <= SHARE_OF_MEMORY * free:
        return None
    return (
        f"takes {needed / 1e9:.0f} GB, and of {free / 1e9:.0f} GB free "
        f"no more than {100 * SHARE_OF_MEMORY:.0f} % is used"
    )


def too_slow(began: Sequence[tuple[int, float]], size: int) -> str | None:
    """Why a size is left out: its first calls, which compile, would take too long.

    Args:
      began: sizes and the seconds of their first calls, so far.
      size: the next one.

    >>> too_slow([], 10_000)
    >>> too_slow([(1000, 10.0)], 3000)
    >>> too_slow([(1000, 10.0), (3000, 90.0)], 10_000)
    'its first calls would take about 17 minutes, as they grow (90 s at 3000)'
    """
    if not began:
        return None
    last, seconds = began[-1]
    power = 1.0
    if len(began) > 1 and seconds > 1.0:
        before, fewer = began[-2]
        power = max(1.0, np.log(seconds / fewer) / np.log(last / before))
    expected = seconds * (size / last) ** power
    if expected <= PATIENCE:
        return None
    return (
        f"its first calls would take about {expected / 60:.0f} minutes, "
        f"as they grow ({seconds:.0f} s at {last})"
    )


def measure(
    module: Any, grows: str, sizes: Sequence[int], fixed: int, rounds: int, *, tiny: bool
) -> Grown:
    """One axis, every size in its turn."""
    out = Grown(grows, fixed)
    began: list[tuple[int, float]] = []
    scratch = np.zeros((1 if tiny else 128) << 18, np.float32)
    for size in sizes:
        count, n_weights = (fixed, size) if grows == "weights" else (size, fixed)
        why = too_large(module.COPIES, n_weights, machine.free_memory()) or too_slow(began, size)
        if why is not None:
            out.left_out[size] = why
            print(f"{size} {grows} are left out: {why}\n", flush=True)
            continue
        beside = module.beside(count, n_weights)
        begin = time.perf_counter()
        beside.move()
        for update in beside.updates.values():
            update()
        began.append((size, time.perf_counter() - begin))
        times = interleaved(
            beside.updates,
            rounds,
            before_round=beside.move,
            before_each=lambda: np.add(scratch, 1, out=scratch),
        )
        errors = beside.errors()
        for who, error in errors.items():
            assert error < TOLERANCE, f"{who}: the average is off by {error:.1e}"
        base = ceiling.NAME if ceiling.NAME in times else None
        title = f"A snapshot: {count} tensors, {n_weights / MILLION:g} M float32 weights"
        about = {"kind": "growth", "grows": grows, "size": size}
        table = Table(title, times, base, absent=beside.absent, about=about)
        table.column("error", errors, "{:.0e}")
        print(table.text(), "\n", flush=True)
        out.tables.append(table.figures() | {"first calls": began[-1][1], "load": command.load()})
        del beside, table, update
        gc.collect()
    return out


def main() -> None:
    parser = command.parser(__doc__, rounds=7)
    parser.add_argument("framework", choices=FRAMEWORKS)
    options = parser.parse_args()
    module = importlib.import_module(f"{options.framework}_growth")
    about = machine.description(module.PACKAGES)
    command.show(about, "x: ratio to the loop in C, median and quartiles of the rounds.")
    tiny = options.quick
    axes = [("weights", SIZES, TENSORS), ("tensors", COUNTS, WEIGHTS)]
    if tiny:
        axes = [("weights", [100, 300, 1000], 10), ("tensors", [3, 10, 30], 300)]
    grown = []
    for grows, sizes, fixed in axes:
        begin = time.monotonic()
        grown.append(
            measure(module, grows, sizes, fixed, command.rounds(options), tiny=tiny).__dict__
        )
        print(f"{grows}: {time.monotonic() - begin:.0f} s\n", flush=True)
    command.write(options.json, about, grown)


if __name__ == "__main__":
    # So that this file, imported by the others, is the same module.
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]
    main()
