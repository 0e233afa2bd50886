"""Reading data and passing it through a model without a trace in random numbers or modules."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from swa_keras.backend import current
from swa_keras.model_state import layers_of


@contextmanager
def preserved_random(data: Any) -> Iterator[None]:
    """Afterwards all random number generators go on as if the data had not been read.

    Those of Python, numpy and (where it is loaded, whatever the backend: a DataLoader draws from
    them) torch, and the generators of a loader's own. A tf.data.Dataset that shuffles keeps its
    order inside itself, where nobody can put it back.

    Args:
      data: what the block iterates over.

    >>> with preserved_random(None):
    ...     first = random.random()
    >>> first == random.random()
    True
    """
    with ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        if torch := sys.modules.get("torch"):
            undo.callback(torch.set_rng_state, torch.get_rng_state())
        for generator in _generators(data):
            undo.callback(generator.set_state, generator.get_state())
        undo.enter_context(current().forked_random())
        yield


@contextmanager
def preserved_modules(model: Any) -> Iterator[None]:
    """Restores what torch modules inside a model keep beside Keras' variables.

    A ``TorchModuleWrapper`` puts its module into training for a pass, which moves the statistics
    of torch's batch norm.
    """
    wrapped = [
        layer.module
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.TorchModuleWrapper)
    ]
    buffers = [(b, b.detach().clone()) for module in wrapped for b in module.buffers()]
    flags = [(part, part.training) for module in wrapped for part in module.modules()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for part, flag in flags:
            part.training = flag


def _generators(data: Any) -> list[Any]:
    """The generators a DataLoader shuffles by, each once."""
    sampler = getattr(data, "sampler", None)
    batches = getattr(data, "batch_sampler", None)
    owners = (data, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    known: dict[int, Any] = {id(g): g for g in found if hasattr(g, "get_state")}
    return [*known.values()]
