"""The batch-norm statistics of a model of flax nnx as a function of themselves and a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from swa_optax.paths import Tree

Forward = Callable[[Any, Any], Any]


def functional(forward: Forward, model: Any) -> tuple[Partial, Tree]:
    """A forward of ``(statistics, (number, batch))``, and the statistics of the model.

    Each call works on a copy of the model, which has the same structure, and forgets it. Random
    numbers differ from batch to batch by its number, as they do in a training.
    """
    from flax import nnx  # somebody has imported it, who made the model

    structure, stats, others = nnx.split(model, nnx.BatchStat, ...)
    if isinstance(forward, Partial):
        return Partial(_Kept(structure), forward, others), stats
    return Partial(_Forward(structure, forward), others), stats


def numbered(batches: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    """Weighted batches with their numbers, as ``functional`` takes them."""
    for number, (weight, batch) in enumerate(batches):
        yield weight, (np.uint32(number), batch)


def put_back(model: Any, stats: Tree) -> None:
    """Gives a model new statistics; nothing else of it changes."""
    from flax import nnx

    nnx.update(model, stats)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Equal to another of the same structure, so that what is compiled is found again."""

    structure: Any

    def __call__(self, forward: Partial, others: Tree, stats: Tree, batch: Any) -> Tree:
        return _Forward(self.structure, forward)(others, stats, batch)


@dataclasses.dataclass(frozen=True)
class _Forward:
    structure: Any
    forward: Forward

    def __call__(self, others: Tree, stats: Tree, numbered: Any) -> Tree:
        from flax import nnx

        number, batch = numbered
        model = nnx.merge(self.structure, stats, others)
        for _, stream in nnx.iter_graph(model):
            if isinstance(stream, nnx.RngKey):
                stream.set_value(_folded(stream.get_value(), number))
        _train_if_wholly_in_evaluation(model)
        self.forward(model, batch)
        return nnx.state(model, nnx.BatchStat)


def _folded(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Other keys for each number; layers that were stacked have arrays of keys."""
    flat = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.reshape(-1))
    return flat.reshape(keys.shape)


def _train_if_wholly_in_evaluation(model: Any) -> None:
    from flax import nnx

    modules = [part for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Module)]
    normal = [part for part in modules if hasattr(part, "use_running_average")]
    if normal and all(part.use_running_average for part in normal):
        for part in modules:
            part.train()
