"""Passing data through a model and leaving no trace: flags, buffers, random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


class Buffers:
    """The buffers of some modules as they are now, to be put back by value.

    Args:
      modules: whose buffers to remember.
      names: which of them; None for all.

    >>> layer = torch.nn.BatchNorm1d(2)
    >>> before = Buffers([layer])
    >>> _ = layer.running_mean.fill_(5.0)
    >>> before.restore()
    >>> layer.running_mean
    tensor([0., 0.])
    """

    def __init__(
        self, modules: list[torch.nn.Module], names: tuple[str, ...] | None = None
    ) -> None:
        self._saved = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
            if names is None or name in names
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was changed, in the same memory where possible."""
        for module, name, buffer, version, value in self._saved:
            module._buffers[name] = buffer
            # Norm layers write their statistics without torch counting it. Elsewhere what was
            # not changed is not touched: a backward pass may be waiting for it.
            if buffer._version != version or isinstance(module, _NormBase):
                buffer.copy_(value)


@contextmanager
def preserved(model: torch.nn.Module, data: Any) -> Iterator[None]:
    """Restores the model's training flags and buffers and all random number generators.

    Args:
      model: what the block computes with.
      data: what the block iterates over; a DataLoader's own generators are restored too, so that
        a training that shuffles with them goes on as if nothing had been read.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = Buffers([module for module, _ in flags])
    generators = [(generator, generator.get_state()) for generator in _generators(data)]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        buffers.restore()
        for generator, state in generators:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)


def _generators(data: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    sampler = getattr(data, "sampler", None)
    batches = getattr(data, "batch_sampler", None)
    for owner in (data, sampler, batches, getattr(batches, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found


def device_of(model: torch.nn.Module) -> torch.device | None:
    """Where a model's first parameter or buffer is; None for a model without any.

    >>> device_of(torch.nn.Linear(1, 1)), device_of(torch.nn.ReLU())
    (device(type='cpu'), None)
    """
    tensors: list[Iterator[Tensor]] = [model.parameters(), model.buffers()]
    return next((tensor.device for kind in tensors for tensor in kind), None)
