"""What averaging costs in JAX, beside what people write and other libraries do.

    python benchmarks/optax_overhead.py [--rounds 7] [--json FILE] [--quick]

Compiled, donated train steps with SGD and Adam; the update alone; steps in a scan; a snapshot
alone, in ratios to a loop in C; updates that are no snapshot. After the timing every average is
compared with float64 (those of scans with each other), and every training of ours with the one
without averaging, bit for bit. On a GPU, if there is one, the same, without the loop in C.

Needs 8 GB. Other work on the machine hits those with more threads harder, the C loop first of all:
look at the load that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import ceiling
import jax
import machine
from optax_snapshots import CEILING
from optax_tables import OPTIMIZERS, Bench, scans, skipped_updates, snapshots, steps
from timing import Table

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
LEGEND = """\
x: ratio to the base, median and quartiles of the rounds; fastest: that of the fastest rounds, which
other work disturbs the least. ms more: than without averaging; of C: the same, in times of the loop
in C on as many weights. of bound: how much longer than memory takes to be gone over as often as the
way must (3 times; 4 to look for NaN first) at the speed of the loop in C. us more: in the fastest
rounds. error: relative, to float64. In copies of the weights: holds, what averaging keeps; + temp,
what the compiled step needs besides. compile s: compiling, in the snapshots' tables with the first
call."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds of little: whether all runs, no figures"
    )
    options = parser.parse_args()
    absent = {}
    try:
        if jax.default_backend() != "cpu":
            raise ceiling.NoCompilerError("the loop runs on the CPU, the rest does not")
        ceiling.library()
    except ceiling.NoCompilerError as error:
        absent[CEILING] = str(error)
    bench = Bench(3 if options.quick else options.rounds, options.quick, absent)
    about = machine.description(PACKAGES)
    about["device"] = jax.devices()[0].device_kind
    print("\n".join(f"{key}: {value}" for key, value in about.items()), "\n", flush=True)
    print(LEGEND, "\n", flush=True)
    tables: list[dict[str, object]] = []

    def show(out: Table) -> None:
        tables.append(out.figures() | {"load": os.getloadavg()[0]})
        print(out.text(), "\n", flush=True)

    begin = time.monotonic()
    millions = 1e6
    for n_weights in (1e4,) if options.quick else (millions, 25 * millions):
        for optimizer in OPTIMIZERS:
            show(steps(bench, optimizer, n_weights))
    show(steps(bench, "SGD", 1e4 if options.quick else 25 * millions, constant=True))
    show(scans(bench, "SGD", 1e4 if options.quick else millions))
    few = replace(bench, rounds=min(bench.rounds, 5))
    if not options.quick:
        show(scans(few, "SGD", 12 * millions))
        show(scans(few, "SGD", 12 * millions, constant=True))
    for count in (10,) if options.quick else (10, 200, 1000):
        show(snapshots(bench, count, 25 * millions, "float32"))
    show(snapshots(bench, 10, 25 * millions, "bfloat16"))
    for count in (10,) if options.quick else (10, 200, 1000):
        show(skipped_updates(bench, count))
    print(f"{time.monotonic() - begin:.0f} s")
    if options.json is not None:
        found = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": {**about, "load_after": os.getloadavg()[0]},
            "tables": tables,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
