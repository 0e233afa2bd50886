"""Meshes of two dimensions: replicas of shards, and shards of shards."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from adapter_torch.distributed.checkpoint_checks import agree, load, save, told
from adapter_torch.distributed.sharded_checks import collectives, mean
from adapter_torch.distributed.training import (
    KEEP,
    adam,
    averaging,
    backward,
    same,
    same_on_all_ranks,
    sgd,
    sharded,
    train,
    whole,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

from swa_torch import SWA


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def averages_are_right(model: torch.nn.Module, optimizer: SWA) -> None:
    snapshots: list[list[torch.Tensor]] = []
    train(model, optimizer, 0, 6, after=lambda: snapshots.append(whole(model.parameters())))
    averages = optimizer.averaged_parameters
    for average, parameter in zip(averages, model.parameters(), strict=True):
        assert isinstance(average, DTensor)
        assert (average.device_mesh, average.placements) == (
            parameter.device_mesh,
            parameter.placements,
        )
    for average, expected in zip(whole(averages), mean(snapshots[1::2]), strict=True):
        torch.testing.assert_close(average, expected, rtol=2e-6, atol=1e-7)
    with optimizer.averaged(model):
        assert same(whole(model.parameters()), whole(averages))
    assert same(whole(model.parameters()), snapshots[-1])


def spoil(model: torch.nn.Module, ranks: tuple[int, ...]) -> None:
    if dist.get_rank() in ranks:
        with torch.no_grad():
            model[0].weight.to_local()[0, 0] = float("inf")


def check_replicas_of_shards(folder: Path) -> None:
    model = sharded(mesh())
    optimizer = averaging(model)
    averages_are_right(model, optimizer)
    assert same_on_all_ranks([t.tolist() for t in whole(optimizer.averaged_parameters)])
    backward(model, optimizer, 6)
    assert collectives(optimizer.step) == {}
    backward(model, optimizer, 7)
    # Replicas decide alike, so it is asked along the other dimension only.
    assert collectives(optimizer.step) == {"c10d.allreduce_": 1}
    spoil(model, (1, 3))
    optimizer.optimizer.zero_grad()
    optimizer.step()
    optimizer.step()
    assert (optimizer.n_averaged, optimizer.n_skipped) == (4, 1)
    kept = sharded(mesh())
    keeping = averaging(kept, config=KEEP)
    train(kept, keeping, 0, 1)
    backward(kept, keeping, 1)
    assert collectives(keeping.step) == {}


def two_dimensional() -> torch.nn.Module:
    """Each weight in shards over one dimension of the mesh, and these in shards over the other."""
    both = mesh()

    def split(name: str, module: torch.nn.Module, inner: DeviceMesh) -> None:
        for key, parameter in [*module.named_parameters(recurse=False)]:
            place = [Shard(parameter.dim() - 1)]
            local = distribute_tensor(parameter.detach(), inner, place)
            module.register_parameter(key, torch.nn.Parameter(local))

    layers = [torch.nn.Linear(*sizes, bias=False) for sizes in ((6, 8), (8, 4))]
    model = torch.nn.Sequential(*layers)
    distribute_module(model, both["inner"], split)
    fully_shard(model, mesh=both["outer"])
    return model


def by_hand(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, (place + 1) / 8)
    optimizer.step()


def check_shards_of_shards(folder: Path) -> None:
    model = two_dimensional()
    assert [len(p.placements) for p in model.parameters()] == [2, 2]
    optimizer = averaging(model)
    snapshots = []
    for _ in range(6):
        by_hand(model, optimizer)
        snapshots.append(whole(model.parameters()))
    averages = optimizer.averaged_parameters
    for average, parameter in zip(averages, model.parameters(), strict=True):
        assert average.placements == parameter.placements
    for average, expected in zip(whole(averages), mean(snapshots[1::2]), strict=True):
        torch.testing.assert_close(average, expected, rtol=2e-6, atol=1e-7)
    by_hand(model, optimizer)
    # Once along each dimension: what one rank says reaches all.
    assert collectives(lambda: by_hand(model, optimizer)) == {"c10d.allreduce_": 2}
    spoil(model, (2,))
    by_hand(model, optimizer)
    by_hand(model, optimizer)
    assert (optimizer.n_averaged, optimizer.n_skipped) == (4, 1)
    full = optimizer.averaged_state_dict(model)
    assert same(full.values(), whole(optimizer.averaged_parameters))


def check_layers_on_meshes_of_their_own(folder: Path) -> None:
    """Ranks that share no shards hear of each other through those that do."""
    for spoilt, by in ((0, 2), (1, 3)):
        both = mesh()
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5))
        fully_shard(model[0], mesh=both["outer"])
        fully_shard(model[1], mesh=both["inner"])
        optimizer = averaging(model)
        for _ in range(2):
            by_hand(model, optimizer)
        by_hand(model, optimizer)
        assert collectives(lambda o=optimizer, m=model: by_hand(m, o)) == {"c10d.allreduce_": 2}
        with torch.no_grad():
            if dist.get_rank() == by:
                model[spoilt].weight.to_local()[0, 0] = float("nan")
        by_hand(model, optimizer)
        by_hand(model, optimizer)
        assert (optimizer.n_averaged, optimizer.n_skipped) == (2, 1)


def check_replicas_are_saved_and_loaded(folder: Path) -> None:
    """Also between meshes of one dimension and of two."""
    for make in (sgd, adam):
        model = sharded(mesh())
        optimizer = averaging(model, make)
        train(model, optimizer, 0, 5)
        save(model, optimizer, folder / f"mesh-{make.__name__}")
        for other in (mesh(), None):
            twin = sharded(other)
            twins = (twin, averaging(twin, make))
            load(*twins, folder / f"mesh-{make.__name__}")
            agree(told(*twins), told(model, optimizer))


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
