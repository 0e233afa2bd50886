"""What the batch-norm layers of a model make of one batch, told apart from what they remember."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from swa_core import BatchNormError
from swa_optax.dependence import UNKNOWN, chains
from swa_optax.paths import Path, Tree, average_dtype, leaves
from swa_optax.placing import fetched

Apply = Callable[[Tree, Any], Tree]
Arrays = dict[Path, Any]

# Old statistics far above any that a batch gives, powers of two, so that multiplying by them rounds
# nothing away. At the farthest nothing of the batch is left in the sum: it tells the momentum, to
# the last bit. A layer for which the other gives another momentum keeps no running average.
_FAR = 2.0**20
_FARTHEST = {4: 2.0**60, 8: 2.0**300}  # by the size of a number in bytes


class Probe:
    """What the layers make of a batch, told apart from what they remember.

    With ``new = m old + (1 - m) of_the_batch``, old statistics of zero give ``(1 - m)
    of_the_batch``, and very large ones m. (Not the derivative by ``old``, which a layer may stop.)

    Args:
      apply: the forward; its arguments are those of the compiled functions.
      stats: the collection.
      paths: of the statistics in it.
      keep: whether what is compiled is kept for the next call with an equal ``apply``.
    """

    def __init__(self, apply: Partial, stats: Tree, paths: list[Path], *, keep: bool) -> None:
        places = {path: place for place, path in enumerate(leaves(stats))}
        self.stats = stats
        self.places = {path: places[path] for path in paths}
        self.still: dict[Path, int] = {}  # those that could move, and do not
        self.shares: Arrays = {}  # 1 - m, of those that move
        if keep:
            self.apply, self.moved, self.measured = apply, _moved, _measured
        else:
            self.apply, self.moved, self.measured = _forgotten(apply)

    def start(self, batch: Any) -> Any:
        """Starts to compute; ``finish`` waits for the result."""
        if self.shares:
            return self.measure(batch)
        self.places = self.find_moving(batch)
        started = self.measure(batch)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(started)):
            raise BatchNormError(
                "update_bn inside of jit cannot pool on the host.",
                hint="call it outside; it compiles the forward itself.",
            )
        self.shares = self.find_shares(started)
        if len(self.shares) == len(self.places):
            return started
        # What frozen layers hold is part of the forward: nothing that was put there is of use.
        self.still = {path: self.places[path] for path in self.places if path not in self.shares}
        self.places = {path: self.places[path] for path in self.shares}
        started = self.measure(batch)
        self.shares = self.find_shares(started)
        return started

    def finish(self, started: Any) -> Arrays:
        """The statistics of a batch, float64."""
        found = {}
        moved, still = jax.tree.map(fetched, started)
        for path, (old, new) in zip(self.still, still, strict=True):
            rounding = 8 * float(np.finfo(old.dtype).eps)
            if not np.allclose(old, new, rtol=rounding, atol=rounding, equal_nan=True):
                raise _not_with_every_batch(path)
        for path, (near, far, _) in zip(self.shares, moved, strict=True):
            rounding = 8 * float(np.finfo(near.dtype).eps)
            near, far = np.float64(near), np.float64(far)
            momentum = 1 - self.shares[path]
            if (near == 0).all() and (far == _FAR).all():
                raise _not_with_every_batch(path)
            if (np.abs(far - near - momentum * _FAR) > rounding * (_FAR + np.abs(near))).any():
                raise _no_running_average(path)
            found[path] = near / self.shares[path]
        return found

    def measure(self, batch: Any) -> Any:
        places, still = tuple(self.places.values()), tuple(self.still.values())
        return self.measured(self.apply, self.stats, batch, places, still)

    def find_moving(self, batch: Any) -> dict[Path, int]:
        """Those that the forward changes, each of them once, and by no running average."""
        places = tuple(self.places.values())
        old = _wide(self.stats, places)
        traced = jax.make_jaxpr(partial(self.moved, places=places))(
            self.apply, self.stats, batch, values=old
        )
        paths = list(self.places)
        others = len(traced.jaxpr.invars) - len(old)
        inputs = [{}] * others + [{place: None} for place in range(len(old))]
        found = chains(traced.jaxpr, inputs)
        divided = chains(traced.jaxpr, inputs, "div")
        moving = [place for place, chain in enumerate(found) if chain.get(place, 1) is not None]
        for place in moving:
            times = max(chain[place].get(place, 1) or 0 for chain in (found, divided))
            if times > 1:
                often = f"{times} times" if times < UNKNOWN else "in a loop of any length"
                raise BatchNormError(
                    f"'{paths[place]}' is updated {often} in one forward: what each of them "
                    "saw cannot be told from their running average.",
                    hint="let apply run the layer once: give what it shares (the two views of a "
                    "siamese network, say) as batches of their own.",
                )
            for other in moving:
                if found[place].get(other, 0) < 0:
                    raise _no_running_average(paths[place])
        if not moving:
            raise _nothing_changed()
        return {paths[place]: places[place] for place in moving}

    def find_shares(self, started: Any) -> Arrays:
        found = {}
        moved = jax.tree.map(fetched, started[0])
        for path, (_, _, farthest) in zip(self.places, moved, strict=True):
            if farthest.dtype.itemsize < 4:
                raise BatchNormError(
                    f"'{path}' is kept in {farthest.dtype}, too coarse to tell its momentum.",
                    hint="keep the running statistics in float32.",
                )
            momentum = farthest / _farthest(farthest.dtype)
            kept = momentum == 1
            if kept.all():
                continue
            if kept.any():
                raise BatchNormError(
                    f"'{path}' is frozen in part: some of it moves, and some does not.",
                    hint="keep frozen layers in arrays of their own.",
                )
            found[path] = 1 - _as_written(momentum)
        if not found:
            raise _nothing_changed()
        return found


def _no_running_average(path: Path) -> BatchNormError:
    return BatchNormError(
        f"'{path}' is no running average: the new value is not momentum * old + (1 - momentum) * "
        "of_the_batch, with the same momentum for all old values.",
        hint="layers that normalise by their running statistics in training (batch "
        'renormalisation, Equinox\' mode="ema") cannot be recomputed in one pass.',
    )


def _not_with_every_batch(path: Path) -> BatchNormError:
    return BatchNormError(
        f"'{path}' moves with some batches, and not with others: which of them it stands for "
        "cannot be told.",
        hint="call update_bn for each kind of batch, with those layers frozen that do not run.",
    )


def _nothing_changed() -> BatchNormError:
    return BatchNormError(
        "the forward changed no running statistics.",
        hint="apply must run in training mode, with a momentum below 1, and return the updated "
        "collection.",
    )


def _moved_from(
    apply: Apply, stats: Tree, batch: Any, *, places: tuple[int, ...], values: list[jax.Array]
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
    new = jax.tree.leaves(moved)
    paths = list(leaves(stats))
    for place in places:
        if jnp.shape(new[place]) != jnp.shape(flat[place]):
            raise BatchNormError(
                f"apply returned '{paths[place]}' with the shape {jnp.shape(new[place])}, but the "
                f"collection has {jnp.shape(flat[place])}.",
                hint="apply must return statistics of the shapes it was given.",
            )
    return [jnp.asarray(new[place]) for place in places]


def _measured_from(
    moved: Any,
    apply: Any,
    stats: Tree,
    batch: Any,
    places: tuple[int, ...],
    still: tuple[int, ...],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What becomes of statistics of zero, of large and of very large ones, along a first axis.

    Only what depends on the old statistics is mapped over the three; the forward is run once.
    Of those that stand still, what they are and what becomes of them.
    """
    old = _wide(stats, still)

    def levels(leaf: jax.Array) -> jax.Array:
        three = jnp.array([0.0, _FAR, _farthest(leaf.dtype)], leaf.dtype)
        return jnp.broadcast_to(three.reshape(3, *[1] * leaf.ndim), (3, *leaf.shape))

    def at(values: list[jax.Array]) -> list[jax.Array]:
        new: list[jax.Array] = moved(
            apply, stats, batch, places=places + still, values=[*values, *old]
        )
        return new

    new = jax.vmap(at)([levels(leaf) for leaf in _wide(stats, places)])
    first = [leaf[0].astype(was.dtype) for leaf, was in zip(new[len(places) :], old, strict=True)]
    return new[: len(places)], [jnp.stack(both) for both in zip(old, first, strict=True)]


def _forgotten(apply: Partial) -> tuple[Any, Any, Any]:
    """What stands for a forward as an argument, and the two, compiled anew: a function may close
    over other parameters by now.

    Functions are no arguments of theirs: JAX would remember them with the structure of the
    arguments, and so what they close over, for as long as the process lives.
    """

    def moved_from(
        arguments: tuple[Any, ...],
        stats: Tree,
        batch: Any,
        *,
        places: tuple[int, ...],
        values: list[jax.Array],
    ) -> list[jax.Array]:
        forward = partial(apply.func, *arguments)
        return _moved_from(forward, stats, batch, places=places, values=values)

    moved = jax.jit(moved_from, static_argnames="places")
    return apply.args, moved, jax.jit(partial(_measured_from, moved), static_argnums=(3, 4))


_moved = jax.jit(_moved_from, static_argnames="places")
_measured = jax.jit(partial(_measured_from, _moved), static_argnums=(3, 4))


def _wide(stats: Tree, places: tuple[int, ...]) -> list[jax.Array]:
    flat = jax.tree.leaves(stats)
    return [jnp.asarray(flat[place], average_dtype(flat[place])) for place in places]


def _farthest(dtype: np.dtype[Any]) -> float:
    return _FARTHEST[np.finfo(dtype).dtype.itemsize]


def _as_written(momentum: np.ndarray[Any, Any]) -> Any:
    """The momentum as the shortest decimal that rounds to it, float64.

    In float32 ``1 - 0.99`` is off by 3e-6, relative; the number that somebody wrote is not.
    """
    values, inverse = np.unique(momentum, return_inverse=True)
    exact = np.array([float(str(value)) for value in values])
    return exact[inverse].reshape(momentum.shape)
