"""Optimizers in optimizers: which one makes the updates, and how it counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from swa_core import SWAError


def chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those it wraps, from the outside in; nothing for None."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def innermost(optimizer: Any) -> Any:
    """The optimizer that makes the updates; those around it scale the loss, or average."""
    return [None, *chain(optimizer)][-1]


def makers(optimizer: Any) -> list[Any]:
    """The optimizers that make the updates: several where each variable may have its own."""
    inner = innermost(optimizer)
    found = list(getattr(inner, "optimizers", None) or [])
    return found or ([] if inner is None else [inner])


def may_leave_out(optimizer: Any) -> bool:
    """Whether updates may be left out because gradients overflowed."""
    loss_scale = keras.optimizers.LossScaleOptimizer
    return any(isinstance(o, loss_scale) for o in chain(optimizer))


def accumulation(optimizer: Any) -> int:
    """Batches per update.

    Raises:
      SWAError: several optimizers that accumulate differently.
    """
    steps = {getattr(o, "gradient_accumulation_steps", None) or 1 for o in makers(optimizer)}
    if len(steps) > 1:
        raise SWAError(
            f"the optimizers of the model accumulate gradients over {sorted(steps)} batches, so "
            "there are no updates of all weights that could be counted.",
            hint="give all of them the same gradient_accumulation_steps.",
        )
    return steps.pop() if steps else 1
