"""Batch-norm statistics over all processes of a group: gathered once, when every rank is done."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from swa_core.errors import BatchNormError
from swa_torch.pooling import Pool
from swa_torch.sharding import are_distributed, is_fully_sharded, reshard

_NAME_GROUP = "say which processes share the data: update_bn(..., group=...)."


def group_of(model: torch.nn.Module) -> Any:
    """The processes among which the model's wrappers share the data; None for this one alone.

    That of DistributedDataParallel or fully_shard, else of SyncBatchNorm.

    Raises:
      BatchNormError: the wrappers differ, or shard in more ways than one.

    >>> group_of(torch.nn.BatchNorm1d(1)) is None
    True
    """
    if not are_distributed():
        return None
    modules = [*model.modules()]
    groups = [_group_of_wrapper(module) for module in modules if _has_group(module)]
    groups += [_group_of_mesh(module) for module in modules if is_fully_sharded(module)]
    if not groups:
        syncing = [module for module in modules if isinstance(module, SyncBatchNorm)]
        groups = [layer.process_group or dist.group.WORLD for layer in syncing]
    groups = [group for group in groups if group is not None]
    if any(group is not groups[0] for group in groups):
        raise BatchNormError("parts of the model share their data differently.", hint=_NAME_GROUP)
    return groups[0] if groups else None


def is_group(group: Any) -> bool:
    """Whether this is a process group, or what stands for one that this process is not in.

    >>> is_group("all")
    False
    """
    return dist.is_available() and (
        isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
    )


class Ranks:
    """What the processes of a group tell each other about one pass over their shares of the data.

    Two collectives, whatever the number of layers and batches: before the first batch, that all
    hold the same layers; after the last, the statistics. Both carry whether a rank failed, so
    that the others do not wait for it.

    Args:
      group: a process group that this process is in, or None if it is alone.
      model: to be passed through.

    Raises:
      BatchNormError: this process is not in the group.
    """

    def __init__(self, group: Any, model: torch.nn.Module) -> None:
        if group is not None and dist.get_rank(group) < 0:
            raise BatchNormError(
                "this process is not in the group that update_bn was given.",
                hint="call it on the processes of the group alone.",
            )
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        # The forward pass of sharded weights waits for all ranks, batch by batch.
        self.is_lockstep = self.group is not None and any(map(_is_sharded, model.modules()))

    @property
    def can_agree(self) -> bool:
        """Whether a rank that fails can tell the others, who may be anywhere in their data."""
        return self.group is not None and not self.is_lockstep

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.group is None or dist.get_rank(self.group) == 0

    def begin(self, layers: dict[str, Any], data: Any, fault: Exception | None) -> None:
        """All ranks agree that they can start.

        Args:
          layers: to be updated, by name.
          data: of which the length matters where the ranks go in lockstep.
          fault: what this rank has to raise, if anything.

        Raises:
          BatchNormError: another rank failed, the layers differ, or weights are sharded and the
            ranks have different numbers of batches.
        """
        if self.group is None:
            if fault is not None:
                raise fault
            return
        unbuilt = [name for name, layer in layers.items() if _is_unbuilt(layer)]
        if unbuilt and fault is None:
            fault = BatchNormError(
                f"layer '{unbuilt[0]}' is not built yet, so ranks cannot agree on its size.",
                hint="pass one batch through the model first.",
            )
        sizes = [(name, layer.num_features) for name, layer in layers.items()]
        length = _length(data) if self.is_lockstep else -1
        header = [fault is not None, zlib.crc32(repr(sizes).encode()), length]
        headers = self._gather(torch.tensor(header, dtype=torch.float64), fault).tolist()
        self._raise_faults(fault, [row[0] for row in headers])
        if any(row[1] != headers[0][1] for row in headers):
            raise BatchNormError(
                "the ranks would update different layers.",
                hint="pass the same model, wrapped, frozen and in training alike, on every rank.",
            )
        lengths = {int(row[2]) for row in headers if row[2] >= 0}
        if len(lengths) > 1:
            raise BatchNormError(
                f"the weights are sharded, and the ranks have {sorted(lengths)} batches: those "
                "with more would wait for the others for ever.",
                hint="give every rank the same number of batches.",
            )

    def pooled(self, pools: Mapping[Any, Pool], n_batches: int, fault: Exception | None) -> int:
        """Makes the statistics of all ranks those of every rank, the same to the last bit.

        Args:
          pools: what the layers of this rank have seen, by layer.
          n_batches: that this rank had.
          fault: what this rank has to raise, if anything.

        Returns:
          The batches of all ranks.

        Raises:
          BatchNormError: another rank failed.
        """
        if self.group is None:
            return n_batches
        device = next(iter(pools)).running_mean.device
        sizes = [layer.num_features for layer in pools for _ in range(2)]
        head = [float(fault is not None), float(n_batches)]
        for pool in pools.values():
            head += [pool.count, pool.batches, pool.is_fixed]
        columns = [column for pool in pools.values() for column in (pool.mean, pool.squares)]
        # A layer that saw nothing has no columns yet.
        wide = [c.to(device, torch.float64).expand(n) for c, n in zip(columns, sizes, strict=True)]
        own = torch.cat([torch.tensor(head, dtype=torch.float64, device=device), *wide])
        rows = self._gather(own, fault)
        heads = rows[:, : len(head)].tolist()
        self._raise_faults(fault, [head[0] for head in heads])
        for pool in pools.values():
            pool.count = pool.batches = 0
        for row, head in zip(rows, heads, strict=True):
            numbers = iter(head[2:])
            statistics = iter(row[len(head) :].split(sizes))
            for pool in pools.values():
                pool.merge(int(next(numbers)), next(statistics), next(statistics))
                pool.batches += int(next(numbers))
                pool.is_fixed |= bool(next(numbers))
        return int(sum(head[1] for head in heads))

    def _raise_faults(self, own: Exception | None, faults: list[float]) -> None:
        if own is not None:
            raise own
        failed = [rank for rank, fault in enumerate(faults) if fault]
        if failed:
            raise BatchNormError(
                f"update_bn failed on rank {', '.join(map(str, failed))} of the group.",
                hint="see the error there.",
            )

    def _gather(self, row: Tensor, fault: Exception | None) -> Tensor:
        """What each rank says [ranks, values], where ``row`` is."""
        # Gloo and MPI talk CPU, whatever else they can; NCCL the accelerator alone.
        backend = dist.get_backend(self.group)
        on_host = "gloo" in backend or "mpi" in backend
        said = row.to("cpu" if on_host else torch.accelerator.current_accelerator())
        rows = [torch.empty_like(said) for _ in range(dist.get_world_size(self.group))]
        try:
            dist.all_gather(rows, said, group=self.group)
        except Exception as error:
            if fault is not None:
                raise fault from error  # the first of the two, and perhaps the other's cause
            raise
        return torch.stack(rows).to(row.device)


@contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """Within the block a forward pass needs no other process, except to gather sharded weights.

    Ranks may have different numbers of batches, so nobody may wait for anybody:
    DistributedDataParallel does not broadcast buffers, SyncBatchNorm normalises with the
    statistics of this rank's batch. DataParallel computes on one device, where the layers are.
    Training flags and buffers are for ``preserved`` to restore.
    """
    changed: list[tuple[Any, str, Any]] = []

    def set_aside(module: Any, name: str, value: Any) -> None:
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                set_aside(module, "broadcast_buffers", False)
                # A forward pass without gradients turns it off.
                set_aside(module, "require_forward_param_sync", False)
            elif isinstance(module, DataParallel):
                set_aside(module, "device_ids", [])
            elif isinstance(module, SyncBatchNorm) and module.training and are_distributed():
                # In evaluation it does not talk; without statistics it takes those of the batch.
                module.training = False
                module.running_mean = module.running_var = None
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)
        reshard(model)


def _has_group(module: Any) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return isinstance(module, DistributedDataParallel) or (
        fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
    )


def _is_sharded(module: Any) -> bool:
    return is_fully_sharded(module) or (
        _has_group(module) and not isinstance(module, DistributedDataParallel)
    )


def _group_of_wrapper(module: Any) -> Any:
    group = module.process_group
    if isinstance(module, DistributedDataParallel):
        return group
    if dist.get_world_size(group) != dist.get_world_size():
        # With hybrid sharding it is that of one copy of the weights; the copies share the data too.
        raise BatchNormError(
            f"FullyShardedDataParallel shards over {dist.get_world_size(group)} of "
            f"{dist.get_world_size()} processes, and whether the others share the data is not to "
            "be seen.",
            hint=_NAME_GROUP,
        )
    return group


def _group_of_mesh(module: torch.nn.Module) -> Any:
    """The group over whose ranks ``fully_shard`` shares a module; None if it has no weights."""
    for parameter in module.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        if mesh.ndim == 1:
            return mesh.get_group()
        n_shards = sum(placement.is_shard() for placement in parameter.placements)
        if mesh.size() == dist.get_world_size() and n_shards == 1:
            return dist.group.WORLD
        raise BatchNormError(
            f"the weights are laid out in {mesh.ndim} dimensions, {parameter.placements}, and "
            "which of them share the data is not to be seen.",
            hint=_NAME_GROUP,
        )
    return None


def _is_unbuilt(layer: torch.nn.Module) -> bool:
    return any(torch.nn.parameter.is_lazy(buffer) for buffer in layer.buffers(recurse=False))


def _length(data: Any) -> int:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return -1
