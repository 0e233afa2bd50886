"""Passing data through a model and leaving no trace: flags, buffers, random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy


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
        held = [
            (module, name, buffer)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and (names is None or name in names)
        ]
        self._saved = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module, name, buffer in held
            if not is_lazy(buffer)
        ]
        self._lazy = {
            module for module, _, buffer in held if is_lazy(buffer) if isinstance(module, _NormBase)
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was changed, in the same memory where possible.

        A layer that was built since has the statistics of a new one then.
        """
        for module, name, buffer, version, value in self._saved:
            module._buffers[name] = buffer
            # Norm layers write their statistics without torch counting it. Elsewhere what was
            # not changed is not touched: a backward pass may be waiting for it.
            if buffer._version != version or isinstance(module, _NormBase):
                buffer.copy_(value)
        for module in self._lazy:
            if not any(map(is_lazy, module.buffers(recurse=False))):
                module.reset_running_stats()


@contextmanager
def preserved(model: torch.nn.Module, data: Any) -> Iterator[None]:
    """Restores the model's training flags and buffers and all random number generators.

    Args:
      model: what the block computes with.
      data: what the block iterates over; a DataLoader's own generators are restored too, so that
        a training that shuffles with them goes on as if nothing had been read.
    """
    modules = [*model.modules()]
    flags = [(module, module.training) for module in modules]
    buffers = Buffers(modules)
    with ExitStack() as undo:
        for restore in _random_states(data):
            undo.callback(restore)
        undo.callback(buffers.restore)
        undo.callback(_set_flags, flags)
        yield


def _set_flags(flags: list[tuple[torch.nn.Module, bool]]) -> None:
    for module, flag in flags:
        if module.training is not flag:
            module.training = flag


def _random_states(data: Any) -> list[Callable[[], None]]:
    """Of each random number generator in reach, what puts it back to where it is now."""
    restores = [_restoring(random.getstate, random.setstate)]
    restores.append(_restoring(np.random.get_state, np.random.set_state))
    restores.append(_restoring(torch.get_rng_state, torch.set_rng_state))
    for generator in _generators(data):
        restores.append(_restoring(generator.get_state, generator.set_state))
    # One that nobody has used yet is not woken up for this.
    if torch.cuda.is_initialized():
        restores.append(_restoring(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if hasattr(torch, "xpu") and torch.xpu.is_initialized():
        restores.append(_restoring(torch.xpu.get_rng_state_all, torch.xpu.set_rng_state_all))
    if torch.backends.mps.is_available():
        restores.append(_restoring(torch.mps.get_rng_state, torch.mps.set_rng_state))
    return restores


def _restoring(get: Callable[[], Any], put: Callable[[Any], Any]) -> Callable[[], None]:
    state = get()
    return lambda: put(state)


def _generators(data: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    sampler = getattr(data, "sampler", None)
    batches = getattr(data, "batch_sampler", None)
    for owner in (data, sampler, batches, getattr(batches, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found
