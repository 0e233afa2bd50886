"""A model's whole state dict with the averages where its weights stand."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swa_core.errors import StructureError
from swa_torch.sharding import are_distributed, is_sharded, like


def full_state_dict(
    model: torch.nn.Module, averages: Mapping[int, Tensor], *, cpu_offload: bool
) -> dict[str, Any]:
    """The model's state dict with its weights replaced, whole and by the names of the plain model.

    Args:
      model: may be wrapped, compiled or sharded.
      averages: what this rank holds of them, by the ``id`` of the parameter.
      cpu_offload: whether to leave the result in the host's memory, of the first rank only.

    Raises:
      StructureError: an average belongs to no parameter of this model.
    """
    held = model.state_dict(keep_vars=True)
    here = {id(value) for value in held.values()}
    if averages and not any(parameter in here for parameter in averages):
        raise StructureError(
            "averaged_state_dict(): none of the averages is of a parameter of this model.",
            hint="pass the model whose parameters the optimizer trains.",
        )
    is_wanted = not cpu_offload or not are_distributed() or torch.distributed.get_rank() == 0
    wanted: OrderedDict[str, Any] = OrderedDict()
    # The versions of modules, which some ask for when they load.
    metadata = getattr(held, "_metadata", {})
    wanted._metadata = {plain_name(model, path): entry for path, entry in metadata.items()}  # type: ignore[attr-defined]
    whole: dict[int, Tensor] = {}  # tied weights are gathered once, and stay tied
    with torch.no_grad():
        for key, value in held.items():
            if not isinstance(value, Tensor):
                wanted[plain_name(model, key)] = value
                continue
            if id(value) not in whole:
                average = averages.get(id(value))
                tensor = _whole(value.detach(), average, cpu_offload=cpu_offload)
                # The others took part in gathering it.
                whole[id(value)] = tensor if is_wanted else tensor.new_empty(0)
            wanted[plain_name(model, key)] = whole[id(value)]
    return wanted if is_wanted else {}


def _whole(live: Tensor, average: Tensor | None, *, cpu_offload: bool) -> Tensor:
    """A whole tensor in memory of its own and in the dtype of the weights."""
    value = live if average is None else like(average.detach().to(live.dtype), live)
    if is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if cpu_offload and value.device.type != "cpu":
        return value.cpu()
    return value.clone()


def plain_name(model: torch.nn.Module, key: str) -> str:
    """A key without what DistributedDataParallel, torch.compile and checkpointing put into it.

    >>> wrapped = torch.compile(torch.nn.Linear(1, 1), backend="eager")
    >>> plain_name(wrapped, "_orig_mod.weight")
    'weight'
    """
    module: Any = model
    names = []
    for name in key.split("."):
        if not (_is_wrapper(module) and name in _INSIDE and name in module._modules):
            names.append(name)
        module = getattr(module, "_modules", {}).get(name)
    return ".".join(names)


_INSIDE = ("module", "_orig_mod", "_checkpoint_wrapped_module")
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
)


def _is_wrapper(module: Any) -> bool:
    # None is imported for it: a wrapper's module is there if the wrapper is.
    kinds = [getattr(sys.modules.get(place), kind, None) for place, kind in _WRAPPERS]
    return any(kind is not None and isinstance(module, kind) for kind in kinds)
