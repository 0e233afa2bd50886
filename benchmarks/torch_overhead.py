"""What averaging costs in PyTorch, beside everybody else who does it, in ratios to a loop in C.

    python benchmarks/torch_overhead.py [--rounds 25] [--sets gpt2] [--json FILE] [--quick]

Snapshots, updates that are none, and swapping; whole train steps; memory and page faults from
processes of their own; on a GPU, if there is one, the share of its copy bandwidth. But for the
train steps the inner optimizer does nothing, so that averaging alone is timed. Weights change
before each round, and after the timing every average is compared with float64. Caches are cold, as
after the passes over activations in training.

gpt2 needs 10 GB. What is not installed is said. Other work on the machine hits those with more
threads harder, the C loop first of all: look at the load that is printed.
"""

from __future__ import annotations

import command
import machine
import memory
import torch
import torch_gpu
from timing import Table
from torch_peers import CEILING, CONTENDERS
from torch_sets import SETS
from torch_tables import Bench, skipped_updates, snapshots, swapping
from torch_training import OPTIMIZERS, trainings

DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "numpy", "torchcontrib", "timm", "ema-pytorch", "torch-ema", "lightning")
LEGEND = """\
x: ratio to the base, median and quartiles of the rounds; fastest: that of the fastest rounds, which
other work disturbs the least. average: the dtype it is kept in. error: relative, to float64.
holds: the average, in copies of the weights in float32; + peak: what is resident besides while the
call runs; faults: minor page faults of an update."""


def measure_memory(bench: Bench, sets: list[str]) -> dict[memory.Request, memory.Figures]:
    """Memory of all contenders on all sets; of two on one set where all is tiny."""
    here = [contender.name for contender in bench.here]
    if bench.tiny:
        sets, here = sets[:1], here[:2]
    requests = [(name, dtype, who) for name in sets for dtype in DTYPES for who in here]
    return dict(zip(requests, memory.measure_all(requests, tiny=bench.tiny), strict=True))


def add_memory(
    out: Table,
    figures: dict[memory.Request, memory.Figures],
    of: tuple[str, str],
    headings: dict[str, str],
) -> None:
    """What the contenders' own processes said about a set and dtype, as columns."""
    here = {who: figure for (*which, who), figure in figures.items() if tuple(which) == of}
    for key, heading in headings.items():
        values = {who: figure[key] for who, figure in here.items() if key in figure}
        out.column(heading, values, "{:.0f}" if key == "faults" else "{:.2f}")
    for who, figure in here.items():
        if "failed" in figure:
            out.unmeasured[who] = f"memory: {figure['failed']}"
            print(f"memory of {who} was not measured: {figure['failed']}")


def on_the_gpu(bench: Bench, sets: list[str]) -> list[Table]:
    """All that is measured on a GPU."""
    torch_gpu.check_synchronisation()
    print('No wait for the GPU: in a step without snapshot, in a snapshot with "keep".\n')
    out = [
        torch_gpu.snapshots(bench.here, name, dtype, bench.rounds)
        for name in sets
        for dtype in DTYPES
    ]
    hidden = torch_gpu.offloaded(bench.rounds)
    return out if hidden is None else [*out, hidden]


def main() -> None:
    parser = command.parser(__doc__, rounds=25)
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated (default: all)")
    options = parser.parse_args()
    sets = command.chosen(parser, "--sets", options.sets, list(SETS))

    absent = {who.name: why for who in CONTENDERS if (why := who.missing()) is not None}
    here = [who for who in CONTENDERS if who.name not in absent]
    bench = Bench(command.rounds(options), options.quick, here, absent)
    about = machine.description(PACKAGES)
    command.show(about, LEGEND)
    if CEILING.name in absent:
        print("Without the C loop, the ratio is to the fastest.\n")

    memories = measure_memory(bench, sets)
    shown = command.Shown()
    for name in sets:
        for dtype in DTYPES:
            out = snapshots(bench, name, dtype)
            headings = {"held": "holds", "peak": "+ peak", "faults": "faults"}
            add_memory(out, memories, (name, dtype), headings)
            shown.add(out)
        out = swapping(bench, name)
        add_memory(out, memories, (name, "float32"), {"swap_peak": "+ peak"})
        shown.add(out)
    shown.add(skipped_updates(bench))
    for optimizer in OPTIMIZERS:
        shown.add(trainings(bench, optimizer))
    if torch.cuda.is_available():
        for out in on_the_gpu(bench, sets):
            shown.add(out)
    else:
        print("No GPU here: nothing was measured on one.")
    command.write(options.json, about, shown.figures)


if __name__ == "__main__":
    main()
