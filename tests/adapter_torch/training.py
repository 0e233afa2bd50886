"""Small trainings for the tests of the PyTorch adapter."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

from swa_core import SWAConfig
from swa_torch import SWA

EVERY_OTHER = SWAConfig(start="4step", every="2step")


def network(seed: int = 0) -> torch.nn.Module:
    """A small network with batch norm, in training mode."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.Tanh(),
        torch.nn.Linear(6, 1),
    )


def batches(number: int, seed: int = 7) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [8, 4] and targets [8, 1]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        x = torch.randn(8, 4, generator=generator)
        yield x, x.sum(1, keepdim=True)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    updates: int,
    seed: int = 7,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """A plain training loop; ``after`` is called behind each update."""
    for x, y in batches(updates, seed):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        after()


def values(tensors: Any) -> list[torch.Tensor]:
    """Copies of tensors, to compare with later."""
    return [tensor.detach().clone() for tensor in tensors]


def same(some: Any, others: Any) -> bool:
    """Whether two lists of tensors agree in dtypes and bits."""
    pairs = [*zip(some, others, strict=True)]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def on_disk(state: Any) -> Any:
    """What torch.load finds after torch.save, without trusting the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def averaging(
    config: Any = EVERY_OTHER, make: Callable[..., Any] = sgd, **lengths: Any
) -> tuple[torch.nn.Module, SWA]:
    """A fresh network and its averaging optimizer."""
    model = network()
    return model, SWA(make(model), config, **lengths)
