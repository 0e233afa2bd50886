"""Weights of a model as people have them: an average, a state dict, tensors, a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from swa_core import AverageFile
from swa_core.errors import StructureError
from swa_core.plots import given as core
from swa_torch.full_state import plain_name
from swa_torch.optimizer import SWA
from swa_torch.sharding import is_sharded, like

# A name, so that signatures say what is meant.
Weights = (
    SWA
    | torch.nn.Module
    | AverageFile
    | Mapping[str, Any]
    | Iterable[Any]
    | str
    | os.PathLike[str]
    | None
)


def weights_in(model: torch.nn.Module) -> dict[str, Tensor]:
    """The floating-point and complex parameters of a model, each once, by name.

    Raises:
      StructureError: there are none, or they have no values here (lazy, sharded, meta).
    """
    found = {}
    for name, parameter in model.named_parameters():
        where = f"parameter '{name}' of {type(model).__name__}"
        if is_lazy(parameter):
            raise StructureError(f"{where} has no shape yet.", hint="run a batch through it first.")
        if is_sharded(parameter) or parameter.is_meta:
            kind = "on the meta device" if parameter.is_meta else "sharded over processes"
            raise StructureError(
                f"{where} is {kind}, so weights cannot be put into it.",
                hint="load optimizer.averaged_state_dict(model), which is whole, into a model on "
                "one device.",
            )
        if parameter.is_floating_point() or parameter.is_complex():
            found[name] = parameter
    if not found:
        raise StructureError(f"{type(model).__name__} has no floating-point parameters.")
    return found


def arrays_of(given: Weights, model: torch.nn.Module, what: str) -> dict[str, Any]:
    """Weights for a model, as numpy arrays of float32 or wider by the names of its parameters.

    None shares memory with the model, also where a state dict does.

    Args:
      given: the average of an ``SWA``; another model; a state dict; tensors or arrays in the order
        of ``model.parameters()``; a safetensors file, or what was read of an average's; None for
        the weights that the model has now.
      model: that they are for.
      what: what they are called in messages.

    Raises:
      StructureError: of another model.
      SwappedError: an average that stands in for the weights right now.
      NothingAveragedError: an average without a snapshot.
    """
    own = weights_in(model)
    if isinstance(given, (str, os.PathLike)):
        given = core.read(given)
    found: Mapping[str, Any]
    if given is None or given is model:
        found = own
    elif isinstance(given, SWA):
        found = _averages(given, own, what)
    elif isinstance(given, torch.nn.Module):
        found = dict(given.named_parameters(remove_duplicate=False))
    elif isinstance(given, AverageFile):
        found = core.averages_of(given)
    elif isinstance(given, Mapping):
        found = given
    elif isinstance(given, (Tensor, np.ndarray)):
        raise TypeError(f"{what}: expected all weights of the model, got one array")
    else:
        return _in_order(list(given), model, own, what)
    return _by_name(found, model, own, what)


def _averages(optimizer: SWA, own: dict[str, Tensor], what: str) -> dict[str, Any]:
    average = optimizer._average
    average.refuse_swapped(what)
    average.refuse_empty(what)
    held = average.by_identity()
    if not any(id(parameter) in held for parameter in own.values()):
        raise StructureError(
            f"{what}: none of the averages is of a parameter of this model.",
            hint="pass the model whose parameters the optimizer trains.",
        )
    # What is not averaged (frozen) is the model's.
    return {
        name: like(held[id(parameter)], parameter) if id(parameter) in held else parameter
        for name, parameter in own.items()
    }


def _in_order(
    given: list[Any], model: torch.nn.Module, own: dict[str, Tensor], what: str
) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    if len(given) != len(names):
        raise StructureError(
            f"{what}: {len(given)} arrays, and the model has {len(names)} parameters.",
            hint="pass them in the order of model.parameters(), or a state dict.",
        )
    return _by_name(dict(zip(names, given, strict=True)), model, own, what)


def _by_name(
    found: Mapping[str, Any], model: torch.nn.Module, own: dict[str, Tensor], what: str
) -> dict[str, Any]:
    """The arrays of the parameters, whatever wraps the model and whichever name of tied ones."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).extend([name, plain_name(model, name)])
    others = {name for name, _ in model.named_buffers()} | set(model.state_dict(keep_vars=True))
    known = {name for several in names.values() for name in several}
    known |= others | {plain_name(model, name) for name in others}
    if unknown := [name for name in found if name not in known]:
        raise StructureError(
            f"{what} holds '{unknown[0]}', which the model does not have.",
            hint=f"it has {', '.join(list(own)[:4])} ...",
        )
    arrays = {}
    for name, parameter in own.items():
        present = [other for other in names[id(parameter)] if other in found]
        if not present:
            raise StructureError(
                f"{what} does not hold parameter '{name}'.",
                hint="pass the weights of the whole model, a state dict for example.",
            )
        array = _on_host(found[present[0]])
        if array.shape != tuple(parameter.shape):
            raise StructureError(
                f"{what}: '{name}' has shape {array.shape}, and the model's "
                f"{tuple(parameter.shape)}.",
                hint="pass weights of this very model.",
            )
        arrays[name] = array
    return arrays


def _on_host(value: Any) -> Any:
    """A copy of a tensor or array in numpy's memory, float32 or wider."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    wide = tensor.dtype
    if wide.is_floating_point and wide.itemsize < 4:
        wide = torch.float32
    elif wide.is_complex and wide.itemsize < 8:
        wide = torch.complex64
    return tensor.to(device="cpu", dtype=wide, copy=True).resolve_conj().resolve_neg().numpy()
