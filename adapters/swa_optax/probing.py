"""What the batch-norm layers of a model make of one batch, told apart from what they remember."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_core import BatchNormError
from swa_optax.paths import Path, Tree, average_dtype, leaves
from swa_optax.placing import fetched

Apply = Callable[[Tree, Any], Tree]
Arrays = dict[Path, Any]

# Far above any statistic, and a power of two, so that multiplying by it rounds nothing away.
_FAR = 2.0**20


class Probe:
    """What the layers make of a batch, told apart from what they remember.

    With ``new = m old + (1 - m) of_the_batch``, m is the derivative by ``old``, and old statistics
    of zero give ``(1 - m) of_the_batch``.
    """

    def __init__(self, apply: Apply, stats: Tree, paths: list[Path]) -> None:
        places = {path: place for place, path in enumerate(leaves(stats))}
        self.places = {path: places[path] for path in paths}
        self.stats = stats
        self.shares: Arrays = {}  # 1 - m, of those that move
        if isinstance(apply, jax.tree_util.Partial):
            self.momenta = partial(_compiled_momenta, apply)
            self.measured = partial(_compiled_measured, apply)
        else:
            # A function is traced anew for each Probe: it may close over other parameters by now.
            self.momenta = jax.jit(partial(_momenta, apply), static_argnums=2)
            self.measured = jax.jit(partial(_measured, apply), static_argnums=2)

    def start(self, batch: Any) -> Any:
        """Starts to compute; ``finish`` waits for the result."""
        if not self.shares:
            self.shares = self.find_shares(batch)
        return self.measured(self.stats, batch, self.moving)

    def finish(self, started: Any) -> Arrays:
        """The statistics of a batch, float64."""
        found = {}
        for path, near, far in zip(self.shares, *started, strict=True):
            near, far = np.float64(fetched(near)), np.float64(fetched(far))
            momentum = 1 - self.shares[path]
            if (np.abs(far - near - momentum * _FAR) > 1e-3 * (_FAR + np.abs(near))).any():
                raise BatchNormError(
                    f"'{path}' is no running average: the new value is not momentum * old + "
                    "(1 - momentum) * of_the_batch, with the same momentum for all old values.",
                    hint="layers that normalise by their running statistics in training (batch "
                    "renormalisation) cannot be recomputed in one pass.",
                )
            found[path] = near / self.shares[path]
        return found

    @property
    def moving(self) -> tuple[int, ...]:
        return tuple(self.places[path] for path in self.shares)

    def find_shares(self, batch: Any) -> Arrays:
        found = self.momenta(self.stats, batch, tuple(self.places.values()))
        moving = [path for path, m in zip(self.places, found, strict=True) if (m != 1).any()]
        if not moving:
            raise BatchNormError(
                "the forward changed no running statistics.",
                hint="apply must run in training mode and return the updated collection.",
            )
        if len(moving) < len(self.places):
            # What frozen layers hold is part of the forward: derivatives by it are no momentum.
            found = self.momenta(self.stats, batch, tuple(self.places[path] for path in moving))
        return {path: 1 - _as_written(path, m) for path, m in zip(moving, found, strict=True)}


def _momenta(apply: Apply, stats: Tree, batch: Any, places: tuple[int, ...]) -> list[jax.Array]:
    """The derivatives of the statistics at these places by themselves."""
    old = _wide(stats, places)
    moved = partial(_moved, apply, stats, batch, places)
    return jax.jvp(moved, (old,), ([jnp.ones_like(leaf) for leaf in old],))[1]


def _measured(
    apply: Apply, stats: Tree, batch: Any, places: tuple[int, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What becomes of statistics of zero, and of very large ones, at these places.

    The forward is the same for both, so the compiler runs it once.
    """
    old = _wide(stats, places)
    near = _moved(apply, stats, batch, places, [jnp.zeros_like(leaf) for leaf in old])
    far = _moved(apply, stats, batch, places, [jnp.full_like(leaf, _FAR) for leaf in old])
    return near, far


_compiled_momenta = jax.jit(_momenta, static_argnums=3)
_compiled_measured = jax.jit(_measured, static_argnums=3)


def _moved(
    apply: Apply, stats: Tree, batch: Any, places: tuple[int, ...], values: list[jax.Array]
) -> list[jax.Array]:
    """The new statistics at these places, with these values there before."""
    flat, structure = jax.tree.flatten(stats)
    for place, value in zip(places, values, strict=True):
        flat[place] = value
    moved = apply(jax.tree.unflatten(structure, flat), batch)
    if jax.tree.structure(moved) != structure:
        raise BatchNormError(
            f"apply returned {jax.tree.structure(moved)}, but the collection is {structure}.",
            hint='return the new collection only: with flax, changed["batch_stats"].',
        )
    return [jax.tree.leaves(moved)[place] for place in places]


def _wide(stats: Tree, places: tuple[int, ...]) -> list[jax.Array]:
    flat = jax.tree.leaves(stats)
    return [jnp.asarray(flat[place], average_dtype(flat[place])) for place in places]


def _as_written(path: Path, momentum: jax.Array) -> Any:
    """The momentum as the shortest decimal that rounds to it, float64.

    In float32 ``1 - 0.99`` is off by 3e-6, relative; the number that somebody wrote is not.
    """
    if momentum.dtype.itemsize < 4:
        raise BatchNormError(
            f"'{path}' is kept in {momentum.dtype}, too coarse to tell its momentum.",
            hint="keep the running statistics in float32.",
        )
    values, inverse = np.unique(fetched(momentum), return_inverse=True)
    exact = np.array([float(str(value)) for value in values])
    return exact[inverse].reshape(momentum.shape)
