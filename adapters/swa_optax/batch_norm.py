"""Exact batch-norm statistics for averaged parameters, in one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.tree_util import Partial

from swa_core import BatchNormError, NonFiniteStatisticsError, SWAWarning
from swa_optax.batches import Size, weighted
from swa_optax.equinox_batch_norm import as_kept, equinox_pairs, is_equinox_state
from swa_optax.nnx_batch_norm import Forward, functional, numbered, put_back
from swa_optax.paths import Path, Tree, averaged_leaves, map_with_path
from swa_optax.placing import placed_like
from swa_optax.probing import Apply, Arrays, Probe
from swa_optax.variables import is_model


def update_bn(
    apply: Apply | Forward, batch_stats: Tree, data: Iterable[Any], *, size: Size | None = None
) -> Tree:
    """The statistics of the pooled data for every batch-norm layer of a model.

    Averaged parameters have activations of their own, which the running statistics of the
    training do not describe. This is one pass over the data in training mode: mean and variance
    of each batch are pooled in float64, weighted by the size of the batch, into those of all the
    data; the variance is the biased one, as in flax. (The average of the batches' variances,
    which momentum would give, is another number.)

    A layer keeps ``momentum * old + (1 - momentum) * of_the_batch``. Old statistics of zero give
    what it makes of the batch, and very large ones its momentum; both come out of one forward.
    Layers that do not move (in evaluation mode) are frozen, and left alone, as is everything in
    the collection that is no pair ``mean`` and ``var`` (haiku's ``mean_ema``, for one; a warning
    says if there is no pair at all).

    Args:
      apply: one forward in training mode: ``(batch_stats, batch) -> new batch_stats``. It is
        compiled at each call of ``update_bn``, once for each shape of batch, with the parameters
        it closes over as constants. A large model is better given as
        ``jax.tree_util.Partial(function, params)``, which is compiled once for all ``params``, as
        long as ``function`` is the same one.
        With a model of flax nnx, ``(model, batch) -> anything``; a Partial of such a function,
        too, is compiled once. It gets copies of the model, whose parameters are no constants.
      batch_stats: the collection, as flax keeps it: a tree with leaves ``mean`` and ``var``; or
        the ``State`` of a model of Equinox. Or a model of flax nnx: where all its batch-norm
        layers are in evaluation mode, the copies are set to ``train()``; where some are, those are
        frozen. Dropout draws other numbers for each batch.
      data: the batches, each a tree of arrays.
      size: the number of elements that each layer averages over in a batch, or anything
        proportional to it [batch -> number >= 0]: with a mask, how many it lets through. The
        default is the length of the first axis, exact as long as all other axes have the same
        lengths in all batches, which is checked.

    Returns:
      The collection with the new statistics, in the structure and dtypes of ``batch_stats``. Or
      the model that was given, which has them now, and nothing else that is new: no random
      number is used up, no flag set. Whatever is raised, it is as it was.

    Raises:
      BatchNormError: no data; batches whose size cannot be told; ``apply`` returned another
        structure, does not train, keeps no running mean or runs a layer twice; statistics with
        NaN or Inf; inside of jit.

    Source:
      Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample
      variances (the pooling). Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2 (the need).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> def apply(stats, x):
    ...     new = {"mean": x.mean(0), "var": x.var(0)}
    ...     return jax.tree.map(lambda old, of_batch: 0.9 * old + 0.1 * of_batch, stats, new)
    >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[7.0]])]
    >>> jax.tree.map(lambda leaf: round(float(leaf[0]), 4), update_bn(apply, stats, batches))
    {'mean': 3.0, 'var': 8.6667}
    """
    if is_model(batch_stats):
        forward, stats = functional(apply, batch_stats)
        batches = numbered(weighted(data, size))
    else:
        forward = apply if isinstance(apply, Partial) else Partial(apply)
        stats, batches = batch_stats, weighted(data, size)
    pairs = _pairs(stats)
    if not pairs:
        holder = "collection" if stats is batch_stats else "model"
        warnings.warn(
            f"update_bn has nothing to do: the {holder} has no statistics 'mean' and 'var'.",
            SWAWarning,
            stacklevel=2,
        )
        return batch_stats
    paths = [path for pair in pairs for path in pair]
    probe = Probe(forward, stats, paths, keep=isinstance(apply, Partial))
    new = _recomputed(probe, pairs, batches)
    if is_equinox_state(stats):
        new = {
            path: as_kept(stats, path, leaf, 1 - probe.shares[path]) for path, leaf in new.items()
        }
    stats = map_with_path(
        lambda path, leaf: placed_like(new[path], leaf) if path in new else leaf, stats
    )
    if not is_model(batch_stats):
        return stats
    put_back(batch_stats, stats)
    return batch_stats


def _recomputed(
    probe: Probe, pairs: list[tuple[Path, Path]], batches: Iterable[tuple[float, Any]]
) -> Arrays:
    """Mean and variance of the pooled data for the layers that move, float64."""
    pooled: dict[Path, _Pooled] = {}
    for weight, of_batch in _each(probe, batches):
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
            raise NonFiniteStatisticsError(
                f"the new statistics '{path}' hold NaN or Inf.",
                hint="look for them in the data and in the averaged parameters.",
            )
    return new


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


def _pairs(stats: Tree) -> list[tuple[Path, Path]]:
    """The paths of the means, each with that of its variance."""
    if is_equinox_state(stats):
        return equinox_pairs(stats)
    found = averaged_leaves(stats)
    pairs = []
    for mean in found:
        for place in (place for place, step in enumerate(mean) if step == "mean"):
            var = Path((*mean[:place], "var", *mean[place + 1 :]))
            if var in found:
                pairs.append((mean, var))
                break
    return pairs


def _each(probe: Probe, batches: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Arrays]]:
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
