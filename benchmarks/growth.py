"""How long a snapshot takes that is larger, or that has more tensors.

    python benchmarks/growth.py torch|keras|optax [--rounds 7] [--json FILE] [--quick]

From 1 M to 500 M float32 weights in 100 tensors, and from 10 to 10 000 tensors of 10 M weights in
all; Keras on the backend that KERAS_BACKEND names. All contenders stand beside each other and run
in turn, so the largest size takes up to 24 GB: who has no memory is left out, and who would take
longer than 90 s to compile, each with the reason. Weights change before each
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
# Who would take longer than this to compile is left out, going by the size before [s].
PATIENCE = 90.0
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


def affordable(
    copies: Mapping[str, float], n_weights: int, free: int | None
) -> tuple[list[str], dict[str, str]]:
    """Who has memory beside each other, and why the others have none.

    Args:
      copies: float32 copies of the weights that each contender takes, those that matter most
        first; under "" what all of them share.
      n_weights: how many there are.
      free: memory [bytes]; None where it is not known.

    >>> copies = {"": 2, "ours": 1, "theirs": 4}
    >>> affordable(copies, 500 * MILLION, 20 * 10**9)
    (['ours', 'theirs'], {})
    >>> affordable(copies, 500 * MILLION, 10 * 10**9)
    (['ours'], {'theirs': 'no memory for all: 14 GB, where 85 % of 10 GB free may be taken'})
    """
    names = [name for name in copies if name]
    if free is None:
        return names, {}

    def needed(of: Sequence[str]) -> float:
        return 4 * n_weights * sum(copies[name] for name in ("", *of))

    here = list(names)
    while here and needed(here) > SHARE_OF_MEMORY * free:
        here.pop()
    why = (
        f"no memory for all: {needed(names) / 1e9:.0f} GB, where {100 * SHARE_OF_MEMORY:.0f} % of "
        f"{free / 1e9:.0f} GB free may be taken"
    )
    return here, {name: why for name in names if name not in here}


def too_slow(began: Sequence[tuple[int, float]], size: int) -> str | None:
    """Why a contender is left out: its first calls, which compile, would take too long.

    Args:
      began: sizes and the seconds of its first two calls, so far.
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
    began: dict[str, list[tuple[int, float]]] = {name: [] for name in module.COPIES if name}
    scratch = np.zeros((1 if tiny else 128) << 18, np.float32)
    for size in sizes:
        count, n_weights = (fixed, size) if grows == "weights" else (size, fixed)
        here, absent = affordable(module.COPIES, n_weights, machine.free_memory())
        absent |= {who: why for who in here if (why := too_slow(began[who], size)) is not None}
        here = [who for who in here if who not in absent]
        if not set(here) - {ceiling.NAME}:
            out.left_out[size] = next(iter(absent.values()))
            print(f"{size} {grows} are left out: {out.left_out[size]}\n", flush=True)
            continue
        beside = module.beside(count, n_weights, here)
        # The first snapshot may be a copy; then the second one compiles.
        first = dict.fromkeys(beside.updates, 0.0)
        for _ in range(2):
            beside.move()
            for who, update in beside.updates.items():
                begin = time.perf_counter()
                update()
                first[who] += time.perf_counter() - begin
        for who, seconds in first.items():
            began[who].append((size, seconds))
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
        about = {"kind": "growth", "of": f"{size} {grows}", "grows": grows, "size": size}
        table = Table(title, times, base, absent={**absent, **beside.absent}, about=about)
        table.column("error", errors, "{:.0e}")
        print(table.text(), "\n", flush=True)
        out.tables.append(table.figures() | {"first calls": first, "load": command.load()})
        del beside, table, update, first
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
