"""Exact batch-norm statistics for averaged parameters, in one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swa_core import BatchNormError, SWAWarning
from swa_optax.paths import Path, Tree, average_dtype, is_averaged, leaves, name
from swa_optax.placing import placed_like

Apply = Callable[[Tree, Any], Tree]
Size = Callable[[Any], float]
Arrays = dict[Path, Any]

# Far above any statistic, and a power of two, so that multiplying by it rounds nothing away.
_FAR = 2.0**20


def update_bn(
    apply: Apply, batch_stats: Tree, data: Iterable[Any], *, size: Size | None = None
) -> Tree:
    """The statistics of the pooled data for every batch-norm layer of a model.

    Averaged parameters have activations of their own, which the running statistics of the
    training do not describe. This is one pass over the data in training mode: mean and variance
    of each batch are pooled in float64, weighted by the size of the batch, into those of all the
    data; the variance is the biased one, as in flax. (The average of the batches' variances,
    which momentum would give, is another number.)

    A layer keeps ``momentum * old + (1 - momentum) * of_the_batch``. The momentum is found by
    differentiating by ``old``, and what the layer makes of old statistics of zero then gives
    those of the batch. Layers that do not move (in evaluation mode) are frozen, and left alone,
    as is everything in the collection that is no pair ``mean`` and ``var``.

    Args:
      apply: one forward in training mode: ``(batch_stats, batch) -> new batch_stats``. It is
        compiled at each call of ``update_bn``, with the parameters it closes over as constants.
        A large model is better given as ``jax.tree_util.Partial(function, params)``, which is
        compiled once for all ``params``.
      batch_stats: the collection, as flax keeps it: a tree with leaves ``mean`` and ``var``.
      data: the batches, each a tree of arrays.
      size: the number of elements that each layer averages over in a batch, or anything
        proportional to it [batch -> number >= 0]. The default is the length of the first axis,
        exact as long as all other axes have the same lengths in all batches, which is checked.

    Returns:
      The collection with the new statistics, in the structure and dtypes of ``batch_stats``.

    Raises:
      BatchNormError: no data; batches whose size cannot be told; ``apply`` returned another
        structure, does not train or keeps no running mean; statistics with NaN or Inf.

    Source:
      Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample
      variances (the pooling). Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2 (the need).

    >>> def apply(stats, x):
    ...     new = {"mean": x.mean(0), "var": x.var(0)}
    ...     return jax.tree.map(lambda old, of_batch: 0.9 * old + 0.1 * of_batch, stats, new)
    >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[7.0]])]
    >>> jax.tree.map(lambda leaf: round(float(leaf[0]), 4), update_bn(apply, stats, batches))
    {'mean': 3.0, 'var': 8.6667}
    """
    pairs = _pairs(batch_stats)
    if not pairs:
        warnings.warn(
            "update_bn has nothing to do: the collection has no leaves 'mean' and 'var'.",
            SWAWarning,
            stacklevel=2,
        )
        return batch_stats
    probe = _Probe(apply, batch_stats, [path for pair in pairs for path in pair])
    pooled: dict[Path, _Pooled] = {}
    for weight, of_batch in _each(probe, _weighted(data, size)):
        for mean, var in pairs:
            if mean in of_batch:
                before = pooled.get(mean, _NOTHING)
                pooled[mean] = before.joined(weight, of_batch[mean], of_batch[var])
    new: Arrays = {}
    for mean, var in pairs:
        if mean in pooled:
            new |= {mean: pooled[mean].mean, var: pooled[mean].var}
    for path, leaf in new.items():
        if not np.isfinite(leaf).all():
            raise BatchNormError(
                f"the new statistics '{path}' hold NaN or Inf.",
                hint="look for them in the data and in the averaged parameters.",
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: placed_like(new[path], leaf) if path in new else leaf, batch_stats
    )


class _Pooled(NamedTuple):
    """Mean and biased variance of everything seen so far, and how much that was."""

    weight: float
    mean: Any
    var: Any

    def joined(self, weight: float, mean: Any, var: Any) -> _Pooled:
        # Centred, so that nothing cancels: E[x^2] - E[x]^2 would, for a mean far from zero.
        total = self.weight + weight
        share = weight / total
        step = mean - self.mean
        spread = share * (1 - share) * step * step
        return _Pooled(
            total, self.mean + share * step, self.var + share * (var - self.var) + spread
        )


_NOTHING = _Pooled(0.0, np.float64(0), np.float64(0))


class _Probe:
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
            # A function is traced anew for each _Probe: it may close over other parameters by now.
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
            near, far = np.float64(near), np.float64(far)
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
    values, inverse = np.unique(np.asarray(momentum), return_inverse=True)
    exact = np.array([float(str(value)) for value in values])
    return exact[inverse].reshape(momentum.shape)


def _pairs(stats: Tree) -> list[tuple[Path, Path]]:
    """The paths of the means, each with that of its variance."""
    found = {
        tuple(map(name, path)): path for path, leaf in leaves(stats).items() if is_averaged(leaf)
    }
    pairs = []
    for names, mean in found.items():
        for place in (place for place, step in enumerate(names) if step == "mean"):
            var = found.get((*names[:place], "var", *names[place + 1 :]))
            if var is not None:
                pairs.append((mean, var))
                break
    return pairs


def _each(probe: _Probe, batches: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Arrays]]:
    """The statistics of each batch; the device has the next one while the host pools the last."""
    running: tuple[float, Any] | None = None
    for weight, batch in batches:
        started = probe.start(batch)
        if running is not None:
            yield running[0], probe.finish(running[1])
        running = weight, started
    if running is None:
        raise BatchNormError(
            "update_bn needs at least one batch, and the data had none.",
            hint="pass a fresh iterable: an iterator that was read before has nothing left.",
        )
    yield running[0], probe.finish(running[1])


def _weighted(data: Iterable[Any], size: Size | None) -> Iterator[tuple[float, Any]]:
    """The batches that are not empty, with their weights."""
    if isinstance(data, Mapping) or hasattr(data, "shape"):
        raise BatchNormError(
            "the data are one batch, not an iterable of batches.", hint="pass [batch]."
        )
    others: Any = None
    for number, batch in enumerate(data, start=1):
        if size is not None:
            weight = float(size(batch))
            if not 0 <= weight < float("inf"):
                raise BatchNormError(
                    f"size gave {weight} for batch {number}, expected a finite number >= 0."
                )
        else:
            weight, now = _rows(batch, number)
            if others is not None and now != others:
                raise BatchNormError(
                    f"batch {number} has the shapes {now} behind the first axis, after {others}: "
                    "how many elements each layer averages over cannot be told.",
                    hint="say size=, a function of the batch.",
                )
            others = now
        if weight:
            yield weight, batch


def _rows(batch: Any, number: int) -> tuple[float, list[tuple[int, ...]]]:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    shapes = [shape for shape in shapes if shape]
    rows = {shape[0] for shape in shapes}
    if len(rows) != 1:
        raise BatchNormError(
            f"the size of batch {number} cannot be told: the first axes of its arrays have the "
            f"lengths {sorted(rows)}.",
            hint="say size=, a function of the batch.",
        )
    return float(rows.pop()), [shape[1:] for shape in shapes]
