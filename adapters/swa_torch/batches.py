"""Batches of any structure: brought to the model's device, counted by a bar, given to the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def device_of(model: torch.nn.Module) -> torch.device | None:
    """Where a model's parameters and buffers are; None if nowhere or on several devices.

    >>> device_of(torch.nn.Linear(1, 1)), device_of(torch.nn.ReLU())
    (device(type='cpu'), None)
    """
    devices = {tensor.device for kind in (model.parameters(), model.buffers()) for tensor in kind}
    return devices.pop() if len(devices) == 1 else None


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on ``device``; what is there already is not copied.

    Looks into mappings, lists, tuples and namedtuples, and calls ``to(device)`` where there is
    one. Anything else stays as it is. The caller's own containers are left alone.

    >>> moved({"x": [torch.zeros(1)], "n": 3}, torch.device("meta"))["x"][0].device
    device(type='meta')
    """
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        # The to() of Hugging Face's batches changes the batch.
        return (copy.copy(batch) if isinstance(batch, Mapping) else batch).to(device)
    if isinstance(batch, Mapping):
        items = {key: moved(value, device) for key, value in batch.items()}
        if all(items[key] is batch[key] for key in items):
            return batch
        if not isinstance(batch, MutableMapping):
            return items
        # A copy keeps what else such a batch holds, and needs no constructor.
        changed = copy.copy(batch)
        changed.update(items)
        return changed
    if isinstance(batch, (tuple, list)):
        parts = [moved(part, device) for part in batch]
        if all(new is old for new, old in zip(parts, batch, strict=True)):
            return batch
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def call(model: torch.nn.Module, batch: Any) -> Any:
    """Calls the model with a batch: a mapping's keywords, a sequence's first entry, or a tensor.

    Raises:
      TypeError: for every other kind.

    >>> call(torch.nn.Identity(), (torch.ones(2), "label"))
    tensor([1., 1.])
    """
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"cannot tell the model's input in a batch of type {type(batch).__name__}; "
        "say how to call the model: forward=lambda model, batch: model(...)"
    )


@contextmanager
def progress_bar(data: Iterable[Any], is_shown: bool) -> Iterator[Iterable[Any]]:
    """The batches, with a bar on standard error that counts them.

    Raises:
      ModuleNotFoundError: tqdm is not installed.
    """
    if not is_shown:
        yield data
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True shows a bar of tqdm, which is not installed. "
            "Install it (pip install tqdm), or leave progress out.",
            name="tqdm",
        ) from error
    with tqdm(data, desc="update_bn", unit="batch") as bar:
        yield bar
