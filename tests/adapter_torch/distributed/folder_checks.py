"""Folders that ranks have saved, averaged by one process and loaded on any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adapter_torch.distributed.training import sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from swa_core.checkpoints import average

NUMBER = 3


def state(seed: int) -> dict[str, Any]:
    """A model sharded by FSDP2, and tensors that are sharded in other ways; odd shapes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(seed)

    def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    model = sharded()
    for parameter in model.parameters():
        full = filled(*parameter.shape)
        with torch.no_grad():
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
    by = {
        "columns": distribute_tensor(filled(7, 5), mesh, [Shard(1)]),
        "middle": distribute_tensor(filled(3, 5, 2), mesh, [Shard(1)]),
        "half": distribute_tensor(filled(9, dtype=torch.bfloat16), mesh, [Shard(0)]),
        "everywhere": distribute_tensor(filled(4), mesh, [Replicate()]),
        # As a convolution in channels_last lies: not in order.
        "turned": filled(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "steps": torch.tensor(12),
        "scalar": filled(),
    }
    return {"model": {**model.state_dict(), **by}, "epoch": 3}


def full(states: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in states["model"].items()
    }


def saving_and_averaging(folder: Path) -> None:
    kept = []
    for seed in range(NUMBER):
        states = state(seed)
        dcp.save(states, checkpoint_id=folder / f"average-{seed}")
        kept.append(full(states))
    if dist.get_rank() == 0:
        assert len({*(folder / "average-0").glob("*.distcp")}) == dist.get_world_size()
        paths = [folder / f"average-{seed}" for seed in range(NUMBER)]
        average(paths, folder / "averaged", key="model", trust=True)
        torch.save(kept, folder / "averaged-of.pt")
    dist.barrier()


def loading(folder: Path) -> None:
    kept = torch.load(folder / "averaged-of.pt", weights_only=True)
    # What is to be loaded into is different from all that was saved.
    found = state(77)
    del found["epoch"]
    dcp.load(found, checkpoint_id=folder / "averaged")
    for name, tensor in full(found).items():
        parts = [states[name] for states in kept]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, parts[0]), name
            continue
        total = parts[0].float() + parts[1].float() + parts[2].float()
        assert torch.equal(tensor, (total / NUMBER).to(tensor.dtype)), name


SAVING = {"a folder of each rank's shards is averaged": saving_and_averaging}
LOADING = {"an averaged folder is loaded on any number of ranks": loading}
