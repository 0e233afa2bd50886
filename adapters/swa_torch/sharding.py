"""Sharded parameters: each rank averages the shard it holds, and ranks decide together.

A parameter that is sharded over ranks is a DTensor. All arithmetic runs on its local shard, a plain
tensor, so a snapshot moves nothing between ranks. Only whether a snapshot is finite is asked of the
others: every rank sees a part of the weights, and one that left a snapshot out alone would hold
another average than the rest. Weights that are replicated (plain tensors under
DistributedDataParallel) need no asking: the gradients were averaged, so every rank sees the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from swa_core.errors import StructureError

_PLAIN = (torch.nn.Parameter, Tensor)
_FSDP = "torch.distributed.fsdp"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which a rank holds its shard.

    >>> is_sharded(torch.zeros(2))
    False
    """
    if type(tensor) in _PLAIN:
        return False
    # Importing the module takes a second, and without it there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the memory itself, not a copy of it.

    Neither autograd nor another rank hears of it.

    Args:
      tensor: a parameter or an average of any shape; a plain tensor is its own shard.

    >>> weight = torch.zeros(2)
    >>> local(weight) is weight
    True
    """
    # Not to_local(): with gradients enabled it is recorded, and of a parameter it makes a view.
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """A rank's shard as a tensor that is sharded as the parameter is; memory is shared.

    Args:
      shard: of the shape of ``local(parameter)`` and any dtype.
      parameter: what it is the average of. If it is a plain tensor, the shard is already whole.

    >>> average = torch.zeros(2, dtype=torch.float64)
    >>> like(average, torch.zeros(2)) is average
    True
    """
    if not is_sharded(parameter) or is_sharded(shard):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    # With the shape said, it is not guessed from this shard: uneven ones would mislead.
    return DTensor.from_local(
        shard.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_of(saved: Tensor, parameter: Tensor) -> Tensor | None:
    """What this rank holds of a saved tensor if it is sharded as the parameter is; moves nothing.

    Args:
      saved: of the parameter's shape, whole or sharded.
      parameter: whose sharding to follow.

    Returns:
      The shard, perhaps in the memory of ``saved``; None if it stands on other ranks.

    >>> shard_of(torch.ones(2), torch.zeros(2))
    tensor([1., 1.])
    """
    if not is_sharded(parameter):
        return None if is_sharded(saved) else saved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    if not isinstance(saved, DTensor):
        # Every rank has the whole and takes its part.
        return distribute_tensor(saved, mesh, placements, src_data_rank=None)._local_tensor
    if saved.device_mesh == mesh and saved.placements == placements:
        return saved._local_tensor
    return None


def drop_whole_copies(model: torch.nn.Module | None, weights: Iterable[Tensor], doing: str) -> None:
    """Makes the next forward pass gather the weights anew that ``fully_shard`` has sharded.

    Its modules may keep the whole weights of the last forward pass until a backward pass (the
    outermost one does so by default); whoever changes the shards then would not be heard.

    Args:
      model: with the modules in question.
      weights: the parameters that change; if none is sharded, nothing is done.
      doing: what needs the model, for the message.

    Raises:
      TypeError: there may be such modules, but no model was given to find them in.
    """
    if _FSDP not in sys.modules or not any(map(is_sharded, weights)):
        return
    if model is None:
        raise TypeError(
            f"{doing} needs the model of sharded weights: model=... Whole copies of them that a "
            "forward pass has left in it have to be dropped."
        )
    reshard(model)


def reshard(model: torch.nn.Module) -> None:
    """Drops the whole weights that modules of ``fully_shard`` hold after a forward pass, if any."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()


def is_fully_sharded(module: Any) -> bool:
    """Whether ``fully_shard`` has sharded the weights of this module.

    >>> is_fully_sharded(torch.nn.Linear(1, 1))
    False
    """
    fsdp = sys.modules.get(_FSDP)  # who has not imported it does not use it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def are_distributed() -> bool:
    """Whether there is a process group in which others than this process may be.

    >>> are_distributed()
    False
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refuse_pieces(parameter: Tensor, name: str, doing: str) -> None:
    """Refuses a parameter of whose values a rank holds none, or pieces that do not tell of others.

    DeepSpeed's ZeRO stage 3 empties parameters; their values stand in a buffer that its own
    optimizer trains. FullyShardedDataParallel, the forerunner of ``fully_shard``, flattens them
    into plain tensors that do not say which ranks hold the rest: ranks could not decide together,
    nor whole weights be found by name.

    Args:
      parameter: of the optimizer.
      name: what to call it.
      doing: what cannot be done, the beginning of the message.

    Raises:
      StructureError: it is one of these.

    >>> refuse_pieces(torch.zeros(0), "parameter 0 of group 0", "cannot average")
    """
    if parameter.numel() == 0 and hasattr(parameter, "ds_id"):
        was = tuple(getattr(parameter, "ds_shape", ()))
        raise StructureError(
            f"{doing}: {name} is empty here (of shape {was} when whole): DeepSpeed's ZeRO stage 3 "
            "has moved its values away.",
            hint=f"train with ZeRO stage 1 or 2, or {_SHARD}",
        )
    if getattr(parameter, "_fsdp_flattened", False):
        raise StructureError(
            f"{doing}: {name} is a piece of what FullyShardedDataParallel has flattened.",
            hint=_SHARD,
        )


_SHARD = (
    "shard with torch.distributed.fsdp.fully_shard, whose parameters are averaged where they are."
)


def agreed(flag: bool | Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether all ranks that hold a part of these weights say yes.

    One scalar all-reduce for each group of ranks that weights are sharded over: one with
    fully_shard, none for weights that every rank holds whole. All these ranks have to call it.

    Args:
      flag: what this rank says; as a scalar on its device it is read back once, at the end.
      tensors: the weights it is about.

    >>> agreed(True, [torch.zeros(2)])
    True
    """
    if are_distributed():
        for group, device in _groups(tensors):
            flag = torch.as_tensor(flag, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)


def _groups(tensors: Iterable[Tensor]) -> list[tuple[Any, str]]:
    """The process groups that weights are sharded over, each once, with the device they talk on.

    Along a dimension of the mesh that only replicates, ranks hold the same and decide the same.
    """
    groups: dict[int, tuple[Any, str]] = {}
    for tensor in tensors:
        if not is_sharded(tensor):
            continue
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if mesh.size(dim) > 1 and not placement.is_replicate():
                group = mesh.get_group(dim)
                groups.setdefault(id(group), (group, mesh.device_type))
    return [*groups.values()]
