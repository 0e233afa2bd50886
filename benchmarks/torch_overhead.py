"""What averaging costs in PyTorch, beside everybody else who does it, in ratios to a loop in C.

    python benchmarks/torch_overhead.py [--rounds 25] [--sets gpt2] [--json FILE] [--quick]

Snapshots, updates that are none, and swapping; memory and page faults from processes of their own;
on a GPU, if there is one, the share of its copy bandwidth. The inner optimizer does nothing, so
that averaging alone is timed. Weights change before each round, and after the timing every average
is compared with float64. Caches are cold, as after the passes over activations in training.

gpt2 needs 10 GB. What is not installed is said. Other work on the machine hits those with more
threads harder, the C loop first of all: look at the load that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import machine
import memory
import numpy as np
import torch
import torch_gpu
from timing import Table, interleaved
from torch_peers import CEILING, CONTENDERS, NEVER, SKIPPING, Contender, Idle, Running
from torch_reference import MovingWeights
from torch_sets import SETS, elements, fill, shapes_of

from swa_torch import SWA

DTYPES = ("float32", "bfloat16")
# Of averages in float32, after some 25 snapshots of weights that differ by a factor of 2.
TOLERANCE = 1e-6
PACKAGES = ("torch", "numpy", "torchcontrib", "timm", "ema-pytorch", "torch-ema", "lightning")
# Their swap is that of one above them in the tables.
SWAP_AS_ANOTHER = (
    'swa_torch, nonfinite="skip"',
    "AveragedModel, swa_multi_avg",
    "AveragedModel, ema_multi_avg",
)
CALLS = 1000
LEGEND = """\
x: ratio to the base, median and quartiles of the rounds. average: the dtype it is kept in.
error: relative, to float64. holds: the average, in copies of the weights in float32; + peak: what
is resident besides while the call runs; faults: minor page faults of an update."""


@dataclass
class Bench:
    """How to measure, and who is here.

    Attributes:
      rounds: rounds that count.
      tiny: whether sets keep their number of tensors, but none of their size.
      here: who can run.
      absent: who cannot, and why.
    """

    rounds: int
    tiny: bool
    here: list[Contender]
    absent: dict[str, str]

    def cool(self) -> Callable[[], object]:
        """Something that empties the caches, and lets the other threads fall asleep.

        It uses one thread. A pool of threads that has just worked spins on, and another pool that
        works next (C's after torch's) would be slow for it.
        """
        scratch = np.zeros((1 if self.tiny else 128) << 18, np.float32)
        return lambda: np.add(scratch, 1, out=scratch)

    def start(self, name: str, dtype: str) -> tuple[torch.nn.Module, MovingWeights]:
        """A set's module, and its weights."""
        shapes = shapes_of(name, tiny=self.tiny)
        module = fill(torch.nn.Module(), shapes, getattr(torch, dtype))
        return module, MovingWeights(module.parameters())

    def title(self, what: str, name: str, dtype: str) -> str:
        """What is measured on which set."""
        shapes = shapes_of(name, tiny=self.tiny)
        count = elements(shapes) / 1e6
        return f"{what}: {name}, {len(shapes)} tensors, {count:.1f} M {dtype} weights"


def snapshots(bench: Bench, name: str, dtype: str) -> Table:
    """One snapshot, by everybody."""
    module, weights = bench.start(name, dtype)
    running = {contender.name: contender.build(module) for contender in bench.here}
    times = interleaved(
        {contender: each.update for contender, each in running.items()},
        bench.rounds,
        before_round=weights.move,
        before_each=bench.cool(),
    )
    dtypes, errors = {}, {}
    for contender in bench.here:
        averages = [average.detach() for average in running[contender.name].averages()]
        (kept,) = {average.dtype for average in averages}
        error = weights.error(averages, contender.mix)
        # An average in bfloat16 is wrong; its error is shown.
        if kept == torch.float32:
            assert error < TOLERANCE, f"{contender.name}: the average is off by {error:.1e}"
        dtypes[contender.name] = str(kept).removeprefix("torch.")
        errors[contender.name] = error
    out = Table(bench.title("A snapshot", name, dtype), times, _base(times), absent=bench.absent)
    out.column("average", dtypes, "{}")
    out.column("error", errors, "{:.0e}")
    traffic = elements(shapes_of(name, tiny=bench.tiny)) * (8 + getattr(torch, dtype).itemsize)
    out.column(
        "GB/s", {who: traffic / seconds / 1e9 for who, seconds in out.medians().items()}, "{:.1f}"
    )
    return out


def swapping(bench: Bench, name: str) -> Table:
    """The average into the module and the weights back, by everybody who has a way of doing so."""
    module, weights = bench.start(name, "float32")
    running = {contender.name: contender.build(module) for contender in bench.here}
    running = {
        who: each
        for who, each in running.items()
        if each.swap_in is not None and who not in SWAP_AS_ANOTHER
    }
    for _ in range(2):
        weights.move()
        for each in running.values():
            each.update()

    def there_and_back(each: Running) -> Callable[[], None]:
        assert each.swap_in is not None
        assert each.swap_out is not None

        def run() -> None:
            each.swap_in()
            each.swap_out()

        return run

    times = interleaved(
        {who: there_and_back(each) for who, each in running.items()},
        bench.rounds,
        before_each=bench.cool(),
    )
    for who, each in running.items():
        live = [weight.clone() for weight in weights.tensors]
        averages = [average.detach().clone() for average in each.averages()]
        each.swap_in()
        assert _equal(weights.tensors, averages), f"{who} does not swap the average in"
        each.swap_out()
        assert _equal(weights.tensors, live), f"{who} does not give the weights back"
    return Table(
        bench.title("In and out", name, "float32"), times, _base(times), absent=bench.absent
    )


def skipped_updates(bench: Bench) -> Table:
    """A step that is no snapshot, by those who count steps themselves."""
    module = fill(torch.nn.Module(), shapes_of("resnet50", tiny=True), torch.float32)
    bare = Idle(module.parameters())
    ours = SWA(Idle(module.parameters()), NEVER)
    steps = {"the bare optimizer's step": bare.step, "swa_torch": ours.step}
    steps |= {who.name: SKIPPING[who.name](module) for who in bench.here if who.name in SKIPPING}

    def repeat(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                step()

        return run

    times = interleaved({who: repeat(step) for who, step in steps.items()}, bench.rounds)
    assert ours.n_averaged == 0
    assert ours.updates == CALLS * (bench.rounds + 1)
    absent = {who: why for who, why in bench.absent.items() if who in SKIPPING}
    out = Table("An update that is no snapshot", times, "the bare optimizer's step", CALLS, absent)
    base = out.medians()[out.base]
    over = {who: 1e6 * (seconds - base) for who, seconds in out.medians().items()}
    out.column("us more", over, "{:.2f}")
    return out


def _base(times: dict[str, list[float]]) -> str | None:
    return CEILING.name if CEILING.name in times else None


def _equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="rounds that count (default: 25)")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds on tiny sets: whether all runs, no figures"
    )
    options = parser.parse_args()
    sets = options.sets.split(",")
    if unknown := set(sets) - SETS.keys():
        parser.error(f"--sets: unknown {sorted(unknown)}; known are {', '.join(SETS)}")

    absent = {who.name: why for who in CONTENDERS if (why := who.missing()) is not None}
    here = [who for who in CONTENDERS if who.name not in absent]
    bench = Bench(3 if options.quick else options.rounds, options.quick, here, absent)
    about = machine.description(PACKAGES)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), "\n", flush=True)
    if CEILING.name in absent:
        print("Without the C loop, the ratio is to the fastest.\n")

    print(LEGEND, "\n", flush=True)
    memories = measure_memory(bench, sets)
    tables = []

    def show(out: Table) -> None:
        tables.append(out)
        print(out.text(), "\n", flush=True)

    for name in sets:
        for dtype in DTYPES:
            out = snapshots(bench, name, dtype)
            headings = {"held": "holds", "peak": "+ peak", "faults": "faults"}
            add_memory(out, memories, (name, dtype), headings)
            show(out)
        out = swapping(bench, name)
        add_memory(out, memories, (name, "float32"), {"swap_peak": "+ peak"})
        show(out)
    show(skipped_updates(bench))
    if torch.cuda.is_available():
        for out in on_the_gpu(bench, sets):
            show(out)
    else:
        print("No GPU here: nothing was measured on one.")
    if options.json is not None:
        found = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": {**about, "load_after": os.getloadavg()[0]},
            "tables": [out.figures() for out in tables],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
