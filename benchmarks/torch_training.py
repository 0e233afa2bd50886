"""Train steps in PyTorch, with and without averaging: everybody trains the same network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from timing import Table, interleaved
from torch import Tensor
from torch.nn import Module
from torch_peers import ALWAYS, CEILING, CONTENDERS, NEVER, Contender, uniform
from torch_tables import TOLERANCE, Bench

from swa_torch import SWA

# As the trainings in Keras are, so that ratios can be set side by side.
LAYERS, WIDTH, BATCH = 4, 1448, 32
EVERY = 10
PLAIN = "plain training"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
}
SCHEDULES: dict[str, Mapping[str, str]] = {
    "swa_torch, never due": NEVER,
    "swa_torch, every 10th": {"start": "1step", "every": f"{EVERY}step"},
    'swa_torch, nonfinite="keep"': {**ALWAYS, "nonfinite": "keep"},
    'swa_torch, nonfinite="skip"': ALWAYS,
}


class Training(NamedTuple):
    """A training that goes on.

    Attributes:
      module: what is trained.
      update: one update, and what averages after it.
      averages: the averages in the order of the parameters, or nothing.
    """

    module: Module
    update: Callable[[], object]
    averages: Callable[[], Any] = lambda: ()


def network(*, tiny: bool) -> tuple[Module, Tensor, Tensor]:
    """Four dense layers, 8.4 M weights in 8 parameters, and a batch; the same each time.

    >>> module, x, y = network(tiny=True)
    >>> len(list(module.parameters())), x.shape == y.shape
    (8, True)
    """
    generator = torch.Generator().manual_seed(0)
    width = 8 if tiny else WIDTH
    module = torch.nn.Sequential()
    for _ in range(LAYERS):
        module.extend([torch.nn.Linear(width, width), torch.nn.Tanh()])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    x = torch.randn((BATCH, width), generator=generator)
    return module, x, x.flip(1).tanh()


def _update(optimizer: torch.optim.Optimizer, module: Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()


def plain(name: str, *, tiny: bool) -> Training:
    """Without averaging."""
    module, x, y = network(tiny=tiny)
    optimizer = OPTIMIZERS[name](module.parameters())
    return Training(module, lambda: _update(optimizer, module, x, y))


def ours(name: str, config: Mapping[str, str], *, tiny: bool) -> Training:
    """With the wrapped optimizer."""
    module, x, y = network(tiny=tiny)
    optimizer = SWA(OPTIMIZERS[name](module.parameters()), config)
    return Training(
        module,
        lambda: _update(optimizer, module, x, y),
        lambda: optimizer.averaged_parameters,
    )


def with_peer(name: str, peer: Contender, *, tiny: bool) -> Training:
    """With somebody else's average, which takes the weights in after every update."""
    module, x, y = network(tiny=tiny)
    optimizer = OPTIMIZERS[name](module.parameters())
    running = peer.build(module)

    def update() -> None:
        _update(optimizer, module, x, y)
        running.update()

    return Training(module, update, running.averages)


def trainings(bench: Bench, name: str) -> Table:
    """A train step with an optimizer, by everybody."""
    tiny = bench.tiny
    own = {who.name for who in CONTENDERS if who.name in SCHEDULES} | {CEILING.name}
    peers = {who.name: who for who in bench.here if who.name not in own}
    running = {PLAIN: plain(name, tiny=tiny)}
    running |= {who: ours(name, config, tiny=tiny) for who, config in SCHEDULES.items()}
    running |= {who: with_peer(name, peer, tiny=tiny) for who, peer in peers.items()}

    def steps(training: Training) -> Callable[[], None]:
        def run() -> None:
            for _ in range(EVERY):
                training.update()

        return run

    runs = {who: steps(training) for who, training in running.items()}
    times = interleaved(runs, bench.rounds)
    trained = list(running[PLAIN].module.parameters())
    for who, training in running.items():
        same = map(torch.equal, training.module.parameters(), trained)
        assert all(same), f"{who} changed the training"
    mixes = {who: uniform for who in SCHEDULES if who in own}
    mixes |= {who: peer.mix for who, peer in peers.items()}
    errors = {who: error(name, peers.get(who), who, mix, tiny=tiny) for who, mix in mixes.items()}
    size = sum(parameter.numel() for parameter in trained) / 1e6
    absent = {who: why for who, why in bench.absent.items() if who != CEILING.name}
    out = Table(
        f"A train step: {name}, {size:.1f} M float32 weights",
        times,
        PLAIN,
        EVERY,
        absent,
        {"kind": "training", "of": f"{name}, {size:.1f} M"},
    )
    out.column("fastest", out.fastest(), "{:.2f}")
    medians = out.medians()
    more = {who: 1e3 * (s - medians[PLAIN]) for who, s in medians.items() if who != PLAIN}
    out.column("ms more", more, "{:.3f}")
    out.column("error", errors, "{:.0e}")
    return out


def error(
    name: str, peer: Contender | None, who: str, mix: Callable[[int], float], *, tiny: bool
) -> float:
    """How far the average of a new training is from float64's after 12 updates, relative."""
    if peer is None:
        training = ours(name, SCHEDULES[who], tiny=tiny)
    else:
        training = with_peer(name, peer, tiny=tiny)
    first = next(training.module.parameters())
    expected = first.detach().double()
    for update in range(1, 13):
        training.update()
        expected += mix(update) * (first.detach().double() - expected)
    found = next(iter(training.averages())).detach().double()
    wrong = float((found - expected).norm() / expected.norm())
    assert wrong < TOLERANCE, f"{who}: the average is off by {wrong:.1e}"
    return wrong
