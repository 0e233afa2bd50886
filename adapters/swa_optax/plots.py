"""The loss around parameters: along a line, over a plane, along random rays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.tree_util import Partial

from swa_core import AverageFile, StateError, StructureError, SWAWarning, plots
from swa_core.plots import given as core
from swa_optax.batch_norm import update_bn
from swa_optax.batches import Size
from swa_optax.checking import expect_parameters
from swa_optax.finding import find_state
from swa_optax.paths import Tree, averaged_leaves, map_with_path
from swa_optax.placing import fetched, placed_like
from swa_optax.reading import finalize
from swa_optax.variables import is_model

Measure = Callable[..., "float | Mapping[str, float]"]
Apply = Callable[[Any, Any, Any], Any]
Progress = bool | Callable[[int, int], object]


def loss_line(
    first: Tree,
    second: Tree,
    measure: Measure,
    *,
    params: Tree = None,
    batch_stats: Tree = None,
    bn_data: Iterable[Any] | None = None,
    apply: Apply | None = None,
    size: Size | None = None,
    positions: Sequence[float] | None = None,
    names: tuple[str, str] = ("w1", "w2"),
    progress: Progress = False,
) -> plots.Line:
    """Measures parameters along the line through two sets of them.

    A network with batch norm needs ``bn_data`` and ``apply``: running statistics belong to the
    parameters that they were gathered on. With those of one end, the other end of the line looks
    far worse than it is, and a barrier appears between parameters that have none. ``measure`` is
    then given the statistics that ``update_bn`` computes at each place.

    Each of the two is a tree of parameters, the optimizer state that holds an average, or a
    safetensors file (or what ``swa_core.load_average`` read). Their places are computed on the host
    in float32 or wider, and are put where the parameters lie, in their dtypes: a compiled
    ``measure`` is compiled once.

    Args:
      first: the parameters at position 0.
      second: the parameters at position 1.
      measure: ``measure(params)``, or ``measure(params, batch_stats)`` if there are any: a number,
        or numbers by name (``{"test error [%]": ..., ...}``). NaN is a hole in the curve.
      params: what the trees are like, where neither of the two is a tree of parameters.
      batch_stats: the collection that ``measure`` is given, of the training. Where it is not
        recomputed, a warning says so.
      bn_data: batches to recompute it from at each place. They are read again each time, so an
        iterator will not do. Overflow there is a NaN.
      apply: one forward in training mode, ``(params, batch_stats, batch) -> new batch_stats``; it
        is compiled once.
      size: as for ``update_bn``.
      positions: where to measure; 0 and 1 always are. By default 21, from -0.5 to 1.5.
      names: what to call the two.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Returns:
      The data: ``draw()`` draws them with matplotlib, ``save(path)`` writes them, ``barrier()``
      tells how far the loss rises in between.

    Raises:
      StructureError: the two are not of one network.
      GeometryError: both are the same, or hold NaN or Inf.
      NothingAveragedError: a state or a file without a snapshot.
      BatchNormError: as ``update_bn``.
      TypeError: ``bn_data`` is an iterator or lacks what it needs, or ``measure`` does not return
        numbers.

    >>> import jax.numpy as jnp
    >>> line = loss_line({"w": jnp.array([0.0])}, {"w": jnp.array([2.0])},
    ...                  lambda params: jnp.sum((params["w"] - 1) ** 2), positions=[0.5])
    >>> line.values(), line.length
    (array([1., 0., 1.]), 2.0)
    """
    like = _like((first, second), params)
    ends = [
        _arrays(weights, like, f"{what} set of parameters of loss_line()")
        for weights, what in ((first, "first"), (second, "second"))
    ]
    measured = _measured(like, measure, batch_stats, bn_data, apply, size)
    return plots.loss_line(*ends, measured, positions=positions, names=names, progress=progress)


def loss_plane(
    first: Tree,
    second: Tree,
    third: Tree,
    measure: Measure,
    *,
    params: Tree = None,
    batch_stats: Tree = None,
    bn_data: Iterable[Any] | None = None,
    apply: Apply | None = None,
    size: Size | None = None,
    points: int | tuple[int, int] = 21,
    margin: float = 0.25,
    x: Sequence[float] | None = None,
    y: Sequence[float] | None = None,
    names: tuple[str, str, str] = ("w1", "w2", "w_SWA"),
    progress: Progress = False,
) -> plots.Plane:
    """Measures parameters over the plane through three sets of them.

    What is said of ``loss_line`` about parameters and batch norm holds here too.

    Args:
      first: parameters, the origin.
      second: parameters that the first axis points to.
      third: parameters on the positive side of the second axis; the average, say.
      measure: ``measure(params)``, or ``measure(params, batch_stats)``.
      params: what the trees are like, where none of the three is a tree of parameters.
      batch_stats: as for ``loss_line``.
      bn_data: batches to recompute the batch-norm statistics from at each place.
      apply: as for ``loss_line``.
      size: as for ``update_bn``.
      points: how many along each axis, or along x and y: 21 are 441 measurements.
      margin: how far the grid goes beyond the three, relative to the larger of the two extents.
      x: the coordinates to measure at, in distances in weight space, instead of ``points``.
      y: likewise.
      names: what to call the three.
      progress: show a bar, or a function, as for ``loss_line``.

    Raises:
      GeometryError: two are the same, or all three on one line.
      Others as ``loss_line``.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.3.

    >>> import jax.numpy as jnp
    >>> weights = [{"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 1.0])]
    >>> plane = loss_plane(*weights, lambda params: jnp.sum(params["w"] ** 2), points=3)
    >>> plane.corners["w_SWA"], plane.at_corners["loss"]
    ((1.0, 1.0), array([0., 4., 2.]))
    """
    like = _like((first, second, third), params)
    corners = [
        _arrays(weights, like, f"{what} set of parameters of loss_plane()")
        for weights, what in ((first, "first"), (second, "second"), (third, "third"))
    ]
    return plots.loss_plane(
        *corners,
        _measured(like, measure, batch_stats, bn_data, apply, size),
        points=points,
        margin=margin,
        x=x,
        y=y,
        names=names,
        progress=progress,
    )


def loss_rays(
    center: Tree,
    measure: Measure,
    *,
    params: Tree = None,
    batch_stats: Tree = None,
    bn_data: Iterable[Any] | None = None,
    apply: Apply | None = None,
    size: Size | None = None,
    directions: int = 10,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    normalization: plots.Normalization = "unit",
    filter_axis: int = -1,
    move_vectors: bool = True,
    fixed: Collection[str] = (),
    name: str = "w",
    progress: Progress = False,
) -> plots.Rays:
    """Measures parameters along random directions: how flat it is around them.

    To compare two sets of parameters, measure both at the same ``radii`` with the same ``seed``.
    What is said of ``loss_line`` about parameters and batch norm holds here too.

    Args:
      center: parameters from which the rays go.
      measure: ``measure(params)``, or ``measure(params, batch_stats)``.
      params: what the tree is like, where ``center`` is not a tree of parameters.
      batch_stats: as for ``loss_line``.
      bn_data: batches to recompute the batch-norm statistics from at each place.
      apply: as for ``loss_line``.
      size: as for ``update_bn``.
      directions: how many rays.
      radii: where to measure along each; 0 always is. By default 11 from 0 to half the norm of the
        parameters that move (for "filter": to 0.5).
      seed: of the directions; one seed gives the same ones for the same network anywhere.
      normalization: "unit": radii are distances in weight space. "filter": each filter moves in
        proportion to its norm, so that the scale of weights before a batch norm, which changes
        nothing, does not look like flatness.
      filter_axis: the axis of a leaf that counts its filters: -1 for the kernels of flax and haiku,
        0 for the weights of Equinox.
      move_vectors: whether leaves of one dimension or none (biases, batch norm) move.
      fixed: the paths of leaves that stay (``"dense/kernel"``).
      name: what to call the parameters.
      progress: show a bar, or a function, as for ``loss_line``.

    Returns:
      The data; ``rise(amount)`` tells how far one can walk before the loss has risen by an amount.

    Raises:
      As ``loss_line``.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.4; Li et al. 2018, arXiv:1712.09913 ("filter").

    >>> import jax.numpy as jnp
    >>> rays = loss_rays({"w": jnp.zeros(3)}, lambda params: jnp.sum(params["w"] ** 2),
    ...                  directions=2, radii=[1, 2])
    >>> rays.rise(1.0).radii.round(4)
    array([1., 1.])
    """
    like = _like((center,), params)
    return plots.loss_rays(
        _arrays(center, like, "parameters of loss_rays()"),
        _measured(like, measure, batch_stats, bn_data, apply, size),
        directions=directions,
        radii=radii,
        seed=seed,
        normalization=normalization,
        filter_axis=filter_axis,
        move_vectors=move_vectors,
        fixed=fixed,
        name=name,
        progress=progress,
    )


def _like(given: Sequence[Tree], params: Tree) -> Tree:
    """The tree that all places are like."""
    like = next((g for g in given if _holds_parameters(g)), None) if params is None else params
    if like is None:
        raise TypeError(
            "an average is an array for each path, and of no container: say what parameters it is "
            "of by params=..."
        )
    if is_model(like):
        raise TypeError(
            "expected parameters, got a model of nnx. Split it (graph, params, rest = "
            "nnx.split(model, nnx.Param, ...)), pass params, and merge inside of measure"
        )
    expect_parameters(like, "loss_line(first, second, measure)")
    return like


def _holds_parameters(given: Tree) -> bool:
    return not isinstance(given, (str, os.PathLike, AverageFile)) and not _is_state(given)


def _is_state(given: Tree) -> bool:
    try:
        find_state(given)
    except StateError as error:
        # Of two averages, or one in a wrong place, its reader tells.
        return "holds no average" not in str(error)
    return True


def _arrays(given: Tree, like: Tree, what: str) -> dict[str, Any]:
    """Parameters as arrays on the host, by printed path."""
    if isinstance(given, (str, os.PathLike)):
        given = core.read(given)
        if isinstance(given, dict):
            return _of_file(given, like, what)
    if isinstance(given, AverageFile):
        return _of_file(core.averages_of(given), like, what)
    tree = finalize(given, like) if _is_state(given) else given
    return _by_name({path: fetched(leaf) for path, leaf in averaged_leaves(tree).items()}, what)


def _of_file(arrays: dict[str, Any], like: Tree, what: str) -> dict[str, Any]:
    """What a file holds, and of the tree what it does not (what was not averaged)."""
    own = _by_name(averaged_leaves(like), what)
    if unknown := [name for name in arrays if name not in own]:
        raise StructureError(
            f"the {what} holds '{unknown[0]}', which the parameters do not have.",
            hint=f"they have {', '.join(list(own)[:4])} ...",
        )
    return {name: arrays[name] if name in arrays else fetched(leaf) for name, leaf in own.items()}


def _by_name(leaves: Mapping[Any, Any], what: str) -> dict[str, Any]:
    found = {str(path): leaf for path, leaf in leaves.items()}
    if len(found) < len(leaves):
        raise StructureError(
            f"the {what} has two leaves of the same path.",
            hint="rename one of their keys; a '/' in it separates like one level of nesting.",
        )
    return found


def _measured(
    like: Tree,
    measure: Measure,
    batch_stats: Tree,
    bn_data: Iterable[Any] | None,
    apply: Apply | None,
    size: Size | None,
) -> Callable[[dict[str, Any]], Any]:
    """A measure of arrays by path."""
    if (bn_data is None) != (apply is None) or (bn_data is not None and batch_stats is None):
        raise TypeError(
            "recomputing batch norm takes three: bn_data=, batch_stats= and "
            "apply=lambda params, batch_stats, batch: new_batch_stats"
        )
    if isinstance(bn_data, Iterator):
        raise TypeError(
            "bn_data is read once for each place, and an iterator is empty after the first; pass a "
            "list of batches"
        )
    if batch_stats is not None and bn_data is None:
        warnings.warn(
            "batch_stats stay those of the parameters they were gathered on, so other parameters "
            "look worse than they are. Pass bn_data=... and apply=...",
            SWAWarning,
            stacklevel=3,
        )

    def measured(arrays: dict[str, Any]) -> Any:
        params = map_with_path(
            lambda path, leaf: (
                placed_like(arrays[str(path)], leaf) if str(path) in arrays else leaf
            ),
            like,
        )
        if batch_stats is None:
            return measure(params)
        if bn_data is None or apply is None:
            return measure(params, batch_stats)
        # Of the same function it is compiled once, for all parameters.
        forward = Partial(apply, params)
        with np.errstate(all="ignore"):  # what overflows is found, and is a hole
            stats = update_bn(forward, batch_stats, bn_data, size=size)
        return measure(params, stats)

    return measured
