"""Small models, sharded or replicated, and how they train here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from swa_core import SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="2step", every="2step")
KEEP = SWAConfig(start="2step", every="2step", nonfinite="keep")


def network() -> torch.nn.Sequential:
    """7 and 5 rows are even over no number of ranks, and one row leaves ranks without any."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 5),
        torch.nn.Tanh(),
        torch.nn.Linear(5, 1),
    )


def sharded(
    mesh: DeviceMesh | None = None, policy: MixedPrecisionPolicy | None = None, **options: Any
) -> torch.nn.Module:
    """The network with the first layer sharded for itself, and the rest at the root."""
    model = network()
    policy = policy or MixedPrecisionPolicy()
    for module in (model[0], model):
        fully_shard(module, mesh=mesh, mp_policy=policy, **options)
    return model


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def plain_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.125)


def batch(update: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank learns from at an update: inputs [4, 5], targets [4, 1]."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * update + rank)
    x = torch.randn(4, 5, generator=generator)
    return x, x.sum(1, keepdim=True)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    begin: int,
    end: int,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """Updates begin + 1 to end of one training."""
    for update in range(begin, end):
        backward(model, optimizer, update)
        optimizer.step()
        after()


def backward(model: torch.nn.Module, optimizer: torch.optim.Optimizer, update: int) -> None:
    """The gradients of one update."""
    optimizer.zero_grad()
    x, y = batch(update)
    torch.nn.functional.mse_loss(model(x), y).backward()


def whole(tensors: Any) -> list[torch.Tensor]:
    """Copies of tensors with all their shards; all ranks have to ask."""
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def same(some: Any, others: Any) -> bool:
    """Whether two lists of whole tensors agree in dtypes and bits."""
    pairs = [*zip(some, others, strict=True)]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def same_on_all_ranks(values: Any) -> bool:
    """Whether all ranks hold the same."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return all(value == found[0] for value in found)


def bits(tensors: Any) -> list[list[float]]:
    """Whole tensors as numbers that compare."""
    return [t.double().flatten().tolist() for t in tensors]


def averaging(model: torch.nn.Module, make: Any = sgd, config: Any = CONFIG, **kwargs: Any) -> SWA:
    return SWA(make(model), config, **kwargs)
