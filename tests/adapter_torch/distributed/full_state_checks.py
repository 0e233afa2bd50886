"""The whole state dict of the averaged model, whatever wraps and shards it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapter_torch.distributed.training import (
    averaging,
    batch,
    network,
    same,
    same_on_all_ranks,
    sgd,
    sharded,
    train,
    whole,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WHOLE = StateDictOptions(full_state_dict=True)
OFFLOADED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def with_buffers() -> torch.nn.Module:
    torch.manual_seed(4)
    layers = torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers)


def is_right(model: torch.nn.Module, optimizer: Any, plain: torch.nn.Module) -> None:
    found = optimizer.averaged_state_dict(model)
    # Names and everything that is not averaged are as torch has them.
    expected = get_model_state_dict(model, options=WHOLE)
    assert [*found] == [*expected] == [*plain.state_dict()]
    averages = dict(
        zip(
            (name for name, _ in plain.named_parameters()),
            whole(optimizer.averaged_parameters),
            strict=True,
        )
    )
    assert same(found.values(), [{**expected, **averages}[name] for name in found])
    assert not same(found.values(), expected.values())
    plain.load_state_dict(found)
    assert all(type(tensor) is torch.Tensor for tensor in found.values())
    with optimizer.averaged(model):
        assert same(optimizer.averaged_state_dict(model).values(), found.values())
    offloaded = optimizer.averaged_state_dict(model, cpu_offload=True)
    assert [*offloaded] == [*get_model_state_dict(model, options=OFFLOADED)]
    if dist.get_rank() == 0:
        assert same(offloaded.values(), found.values())
    # Batch norm has seen other data on each rank.
    assert same_on_all_ranks([found[name].tolist() for name in averages])


def check_replicated(folder: Path) -> None:
    model = DistributedDataParallel(with_buffers())
    optimizer = averaging(model)
    train(model, optimizer, 0, 5)
    is_right(model, optimizer, with_buffers())
    # The wrapped module is as good.
    is_right(model.module, optimizer, with_buffers())


def check_sharded(folder: Path) -> None:
    model = with_buffers()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = averaging(model)
    train(model, optimizer, 0, 5)
    model.eval()
    with torch.no_grad():
        model(batch(0)[0])  # whole weights may stay in the model
    is_right(model, optimizer, with_buffers())


def check_sharded_and_compiled(folder: Path) -> None:
    model = sharded()
    optimizer = averaging(model)
    train(model, optimizer, 0, 5)
    compiled = torch.compile(model, backend="eager")
    is_right(compiled, optimizer, network())


def check_half_precision_keeps_its_dtype(folder: Path) -> None:
    model = sharded().bfloat16()
    optimizer = averaging(model, sgd)
    for update in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(update))
        optimizer.step()
    found = optimizer.averaged_state_dict(model)
    expected = [average.bfloat16() for average in whole(optimizer.averaged_parameters)]
    assert same(found.values(), expected)


def check_average_files(folder: Path) -> None:
    """What ranks hold in parts goes into one file, and comes out in other parts."""
    model = with_buffers()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = averaging(model)
    train(model, optimizer, 0, 5)
    optimizer.save_average(folder / "average", model)
    averages = [*whole(optimizer.averaged_parameters)]
    plain = with_buffers()
    alone = averaging(plain)
    alone.load_average(folder / "average", plain)
    assert same(alone.averaged_parameters, averages)
    other = with_buffers()
    fully_shard(other)
    resumed = averaging(other)
    resumed.load_average(folder / "average", other)
    assert same(whole(resumed.averaged_parameters), averages)
    for shard, parameter in zip(resumed.averaged_parameters, other.parameters(), strict=True):
        assert shard.placements == parameter.placements
    train(other, resumed, 5, 9)
    assert (resumed.updates, resumed.n_averaged) == (9, optimizer.n_averaged + 2)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
