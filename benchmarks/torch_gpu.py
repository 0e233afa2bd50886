"""What averaging costs on a GPU: its share of the copy bandwidth, and who waits for whom."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timing import Table, interleaved
from torch_peers import ALWAYS, CEILING, NEVER, Contender, Idle
from torch_reference import MovingWeights
from torch_sets import fill, shapes_of

from swa_torch import SWA

COPY = "a copy on the device"
STEPS = 10


def snapshots(contenders: list[Contender], name: str, dtype: str, rounds: int) -> Table:
    """One snapshot by everybody, beside a copy from device memory to device memory.

    A copy moves 2 bytes for each byte of its source; a snapshot reads weights and averages and
    writes averages. The last column is the bandwidth of the snapshot over that of the copy.
    """
    module = fill(torch.nn.Module(), shapes_of(name), getattr(torch, dtype)).cuda()
    weights = MovingWeights(module.parameters())
    count = sum(weight.numel() for weight in weights.tensors)
    source, target = (torch.zeros(count, device="cuda") for _ in range(2))
    here = [contender for contender in contenders if contender is not CEILING]
    running = {contender.name: contender.build(module) for contender in here}
    runs = {COPY: lambda: target.copy_(source)}
    runs |= {who: each.update for who, each in running.items()}
    times = interleaved(
        {who: _finished(run) for who, run in runs.items()},
        rounds,
        before_round=weights.move,
        before_each=torch.cuda.synchronize,
    )
    for contender in here:
        averages = [average.detach() for average in running[contender.name].averages()]
        if averages[0].dtype == torch.float32:
            assert weights.error(averages, contender.mix) < 1e-6, contender.name
    about = {"kind": "snapshot on the GPU", "of": f"{name}, {dtype}"}
    out = Table(f"A snapshot on the GPU: {name}, {dtype} weights", times, COPY, about=about)
    bytes_moved = dict.fromkeys(times, count * (8 + weights.tensors[0].itemsize))
    bytes_moved[COPY] = count * 8
    rates = {who: bytes_moved[who] / seconds for who, seconds in out.medians().items()}
    out.column("of copy", {who: rate / rates[COPY] for who, rate in rates.items()}, "{:.2f}")
    return out


def check_synchronisation() -> None:
    """A step that takes no snapshot, and one with ``nonfinite="keep"``, never wait for the GPU.

    Raises:
      RuntimeError: torch's, at the operation that waits.
    """
    for config in (NEVER, {**NEVER, "nonfinite": "keep"}, {**ALWAYS, "nonfinite": "keep"}):
        module = fill(torch.nn.Module(), shapes_of("resnet50"), torch.float32).cuda()
        optimizer = SWA(Idle(module.parameters()), config)
        optimizer.step()  # the averages are allocated
        with _sync_is_an_error():
            for _ in range(3):
                optimizer.step()


def offloaded(rounds: int) -> Table | None:
    """Training steps on the GPU, alone and with averages on the host, where SWA has them there.

    Averaging is hidden if a step with it takes as long as one without.
    """
    if "device" not in inspect.signature(SWA).parameters:
        return None
    width, layers, every = 4096, 8, STEPS
    x = torch.randn(2048, width, device="cuda")
    schedule = {"start": f"{every}step", "every": f"{every}step", "nonfinite": "keep"}
    runs, optimizers = {}, {}
    for who, wrap in {
        "training": lambda optimizer: optimizer,
        "averages on the GPU": lambda optimizer: SWA(optimizer, schedule),
        "averages on the host": lambda optimizer: SWA(optimizer, schedule, device="cpu"),
    }.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).cuda()
        optimizers[who] = wrap(torch.optim.SGD(model.parameters(), lr=1e-3))
        runs[who] = _finished(_training(model, optimizers[who], x))
    times = interleaved(runs, rounds)
    on_gpu, on_host = (
        optimizers[f"averages on the {place}"].averaged_parameters for place in ("GPU", "host")
    )
    for one, other in zip(on_gpu, on_host, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-7)
    title = f"{STEPS} training steps on the GPU, one snapshot of {layers * width**2 / 1e6:.0f} M"
    return Table(title, times, "training", about={"kind": "training on the GPU", "of": "offload"})


def _training(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor):
    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return run


def _finished(run: Callable[[], object]) -> Callable[[], None]:
    def with_the_wait() -> None:
        run()
        torch.cuda.synchronize()

    return with_the_wait


@contextmanager
def _sync_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
