"""What averaging costs in JAX, beside what people write and other libraries do.

    python benchmarks/optax_overhead.py [--rounds 7] [--tables steps] [--json FILE] [--quick]

Compiled, donated train steps with SGD and Adam; the update alone; steps in a scan; a snapshot
alone, in ratios to a loop in C; updates that are no snapshot. After the timing every average is
compared with float64 (those of scans with each other), and every training of ours with the one
without averaging, bit for bit. On a GPU, if there is one, the same, without the loop in C.

Needs 8 GB. Other work on the machine hits those with more threads harder, the C loop first of all:
look at the load that is printed.
"""

from __future__ import annotations

import time
from dataclasses import replace

import ceiling
import command
import jax
import machine
from optax_snapshots import CEILING
from optax_tables import OPTIMIZERS, Bench, scans, skipped_updates, snapshots, steps

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
LEGEND = """\
x: ratio to the base, median and quartiles of the rounds; fastest: that of the fastest rounds, which
other work disturbs the least. ms more: than without averaging; of C: the same, in times of the loop
in C on as many weights. of bound: how much longer than memory takes to be gone over as often as the
way must (3 times; 4 to look for NaN first) at the speed of the loop in C. us more: in the fastest
rounds. error: relative, to float64. In copies of the weights: holds, what averaging keeps; + temp,
what the compiled step needs besides. compile s: compiling, in the snapshots' tables with the first
call."""


TABLES = ("steps", "constant", "scans", "snapshots", "skipped")
MILLIONS = 1e6


def main() -> None:
    parser = command.parser(__doc__, rounds=7)
    add = parser.add_argument
    add("--tables", default=",".join(TABLES), help="comma-separated (default: all)")
    add("--weights", default="1,25", help="millions of weights of the train steps (default: 1,25)")
    options = parser.parse_args()
    tables = command.chosen(parser, "--tables", options.tables, TABLES)
    absent = {}
    try:
        if jax.default_backend() != "cpu":
            raise ceiling.NoCompilerError("the loop runs on the CPU, the rest does not")
        ceiling.library()
    except ceiling.NoCompilerError as error:
        absent[CEILING] = str(error)
    bench = Bench(command.rounds(options), options.quick, absent)
    about = machine.description(PACKAGES)
    about["device"] = jax.devices()[0].device_kind
    command.show(about, LEGEND)
    shown = command.Shown()

    begin = time.monotonic()
    sizes = [MILLIONS * float(size) for size in options.weights.split(",")]
    counts = (10,) if options.quick else (10, 200, 1000)
    if "steps" in tables:
        for n_weights in (1e4,) if options.quick else sizes:
            for optimizer in OPTIMIZERS:
                shown.add(steps(bench, optimizer, n_weights))
    if "constant" in tables:
        shown.add(steps(bench, "SGD", 1e4 if options.quick else 25 * MILLIONS, constant=True))
    if "scans" in tables:
        shown.add(scans(bench, "SGD", 1e4 if options.quick else MILLIONS))
        few = replace(bench, rounds=min(bench.rounds, 5))
        if not options.quick:
            shown.add(scans(few, "SGD", 12 * MILLIONS))
            shown.add(scans(few, "SGD", 12 * MILLIONS, constant=True))
    if "snapshots" in tables:
        for count in counts:
            shown.add(snapshots(bench, count, 25 * MILLIONS, "float32"))
        shown.add(snapshots(bench, 10, 25 * MILLIONS, "bfloat16"))
    if "skipped" in tables:
        for count in counts:
            shown.add(skipped_updates(bench, count))
    print(f"{time.monotonic() - begin:.0f} s")
    command.write(options.json, about, shown.figures)


if __name__ == "__main__":
    main()
