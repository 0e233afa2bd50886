"""What averaging costs in Keras, beside Keras' own and what people write, on every backend.

    python benchmarks/keras_overhead.py [--backend jax] [--rounds 25] [--memory swap] [--json FILE]

Trainings with ``fit``; a snapshot alone, in ratios to a loop in C; swapping; batches that take no
snapshot; memory and page faults, from processes of their own. Keras has one backend in a process,
so each backend is measured in one of its own; ratios are to what ran in turn with it there. After
the timing every average is compared with float64, and every training with the one without
averaging, bit for bit.

Needs 3 GB. Other work on the machine hits those with more threads harder, the C loop first of all:
look at the load that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import command
import machine

BACKENDS = ("tensorflow", "jax", "torch")
DTYPES = ("float32", "bfloat16")
# Each of them takes a process for each contender, and so most of the time where rounds are few.
MEMORY = ("fit", *DTYPES, "swap")
LEGEND = """\
x: ratio to the base, median and quartiles of the rounds; fastest: that of the fastest rounds, which
other work disturbs the least. error: relative, to float64 (of swapping: absolute, of a value).
In copies of the weights in float32: holds, what an average keeps; + peak, what is resident besides
while the call runs; swapped, while the model holds the average. faults: minor page faults of an
update."""


def measure(rounds: int, memory: list[str], *, tiny: bool) -> list[dict[str, Any]]:
    """All tables of the backend of this process, printed as they come.

    Args:
      rounds: that count.
      memory: of which of MEMORY it is measured.
      tiny: whether all is small.
    """
    import ceiling
    import keras
    import keras_fit
    import keras_memory
    from keras_contenders import CEILING, EMA
    from keras_sets import SETS
    from keras_tables import Bench, skipped_updates, snapshots, swapping
    from timing import Table

    absent = {}
    try:
        ceiling.library()
    except ceiling.NoCompilerError as error:
        absent[CEILING] = str(error)
    bench = Bench(rounds, tiny, absent)
    backend = keras.backend.backend()
    about = machine.description(["keras", backend, "numpy"])
    print(f"Keras on {backend}")
    print("\n".join(f"{key}: {value}" for key, value in about.items()), "\n", flush=True)
    shown = command.Shown()

    def add(out: Table, of: str, headings: dict[str, str]) -> None:
        """What the contenders' own processes say, as columns."""
        if of not in memory:
            return
        left_out = {CEILING, *((keras_fit.PLAIN, EMA) if of == "fit" else ())}
        names = [name for name in out.times if name not in left_out]
        if tiny:
            names = [name for name in names if name.startswith("swa_keras")][-1:]
        # Where there are no figures to be had, one process shows that it works.
        apart = not tiny or of == "float32"
        figures = keras_memory.measure_all([(name, of) for name in names], tiny=tiny, apart=apart)
        by_name = dict(zip(names, figures, strict=True))
        for key, heading in headings.items():
            values = {name: figure[key] for name, figure in by_name.items() if key in figure}
            out.column(heading, values, "{:.0f}" if key == "faults" else "{:.2f}")
        for name, figure in by_name.items():
            if "failed" in figure:
                out.unmeasured[name] = f"memory: {figure['failed']}"
                print(f"memory of {name} was not measured: {figure['failed']}")

    out = keras_fit.fitting(rounds, tiny=tiny)
    add(out, "fit", {"held": "holds", "fit": "+ in fit"})
    shown.add(out)
    for name in [keras_memory.SET] if tiny else SETS:
        for dtype in DTYPES:
            out = snapshots(bench, name, dtype)
            if name == keras_memory.SET:
                add(out, dtype, {"held": "holds", "peak": "+ peak", "faults": "faults"})
            shown.add(out)
        out = swapping(bench, name)
        if name == keras_memory.SET:
            add(out, "swap", {"swapped": "swapped", "swap_peak": "+ peak"})
        shown.add(out)
    shown.add(skipped_updates(bench))
    return [figures | {"backend": backend} for figures in shown.figures]


def in_a_process(backend: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The tables of a backend, from a process of its own."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "KERAS_BACKEND": backend}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tables.json"
        run = [sys.executable, __file__, "--here", "--json", str(file), *arguments]
        subprocess.run(run, check=True, env=environment)
        return json.loads(file.read_text(encoding="utf-8"))["tables"]


def main() -> None:
    parser = command.parser(__doc__, rounds=25)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument(
        "--memory", default=",".join(MEMORY), help="of which it is measured (default: all)"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = command.chosen(parser, "--memory", options.memory, MEMORY)
    about = machine.description(["keras", *BACKENDS, "numpy"])
    if options.here:
        tables = measure(command.rounds(options), memory, tiny=options.quick)
    else:
        print(LEGEND, "\n", flush=True)
        arguments = ["--rounds", str(options.rounds), "--memory", options.memory]
        arguments += ["--quick"] if options.quick else []
        tables = [
            table
            for backend in options.backend or BACKENDS
            for table in in_a_process(backend, arguments)
        ]
    command.write(options.json, about, tables)


if __name__ == "__main__":
    main()
