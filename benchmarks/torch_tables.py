"""The tables of the benchmark: a snapshot, swapping, and an update that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from timing import Table, interleaved
from torch_peers import CEILING, NEVER, SKIPPING, Contender, Idle, Running
from torch_reference import MovingWeights
from torch_sets import elements, fill, shapes_of

from swa_torch import SWA

# Of averages in float32, after some 25 snapshots of weights that differ by a factor of 2.
TOLERANCE = 1e-6
# Their swap is that of one above them in the tables.
SWAP_AS_ANOTHER = (
    'swa_torch, nonfinite="skip"',
    "AveragedModel, swa_multi_avg",
    "AveragedModel, ema_multi_avg",
)
CALLS = 1000


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
    out = Table(
        bench.title("A snapshot", name, dtype),
        times,
        _base(times),
        absent=bench.absent,
        about={"kind": "snapshot", "of": f"{name}, {dtype}"},
    )
    out.column("fastest", out.fastest(), "{:.2f}")
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
    out = Table(
        bench.title("In and out", name, "float32"),
        times,
        _base(times),
        absent=bench.absent,
        about={"kind": "swap", "of": f"{name}, float32"},
    )
    out.column("fastest", out.fastest(), "{:.2f}")
    return out


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
    out = Table(
        "An update that is no snapshot",
        times,
        "the bare optimizer's step",
        CALLS,
        absent,
        {"kind": "skipped", "of": "resnet50"},
    )
    base = out.medians()[out.base]
    over = {who: 1e6 * (seconds - base) for who, seconds in out.medians().items()}
    out.column("us more", over, "{:.2f}")
    return out


def _base(times: dict[str, list[float]]) -> str | None:
    return CEILING.name if CEILING.name in times else None


def _equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
