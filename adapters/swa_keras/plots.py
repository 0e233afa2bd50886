"""The loss around a model's weights: along a line, over a plane, along random rays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from swa_core import SWAWarning, plots
from swa_core.interrupts import uninterrupted
from swa_keras import batch_norm
from swa_keras.backend import current
from swa_keras.batches import fault_of
from swa_keras.given_weights import Weights, arrays_of, weights_in
from swa_keras.lending import usable
from swa_keras.model_state import averaged_variables, state_variables, synced
from swa_keras.preserving import preserved_modules, preserved_random
from swa_keras.ranks_torch import unwrapped
from swa_keras.recording import Forward

Measure = Callable[[keras.Model], "float | Mapping[str, float]"]
Progress = bool | Callable[[int, int], object]


def loss_line(
    model: keras.Model,
    first: Weights,
    second: Weights,
    measure: Measure,
    *,
    bn_data: Any = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    positions: Sequence[float] | None = None,
    names: tuple[str, str] = ("w1", "w2"),
    progress: Progress = False,
) -> plots.Line:
    """Measures a model along the line through two sets of weights.

    The model takes the weights of each place in turn and is handed to ``measure``, which may call,
    ``evaluate`` or ``predict``, but not train. Afterwards its weights, running statistics, seeds
    and all random number generators are as before, whatever is raised; at each place they begin
    alike.

    A model with batch norm needs ``bn_data``: running statistics belong to the weights that they
    were gathered on. With those of one end, the other end of the line looks far worse than it is,
    and a barrier appears between weights that have none. Without it a warning says so.

    Weights can be the ``SWA`` callback or the ``SWAOptimizer`` (its average), arrays in the order
    of ``model.trainable_variables`` or from ``get_weights()``, another model of the same structure,
    a safetensors file (an average's, say), or None for those that the model has now. Running
    statistics among them are not taken.

    Args:
      model: the model, built; compiled if ``measure`` evaluates it.
      first: the weights at position 0.
      second: the weights at position 1.
      measure: model -> a number, or numbers by name (``{"test error [%]": ..., ...}``). NaN is a
        hole in the curve. ``model.evaluate(x, y, verbose=0, return_dict=True)`` is a mapping.
      bn_data: data to recompute the batch-norm statistics from at each place, in any form that
        ``update_bn`` takes but a generator, because it is read again each time. Overflow there is
        a NaN.
      batch_size: for ``bn_data`` of arrays; take that of the training.
      forward: as for ``update_bn``.
      positions: where to measure; 0 and 1 always are. By default 21, from -0.5 to 1.5.
      names: what to call the two.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Returns:
      The data: ``draw()`` draws them with matplotlib, ``save(path)`` writes them, ``barrier()``
      tells how far the loss rises in between.

    Raises:
      StructureError: the weights are not of this model.
      GeometryError: both are the same, or hold NaN or Inf.
      NothingAveragedError, SwappedError: a callback or optimizer without an average, or inside
        its ``averaged()``.
      BatchNormError: as ``update_bn``.
      TypeError: ``bn_data`` is a generator, or ``measure`` does not return numbers.

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> x = np.ones((4, 1), np.float32)
    >>> line = loss_line(model, [np.float32([[1]])], [np.float32([[3]])],
    ...                  lambda model: keras.ops.mean(model(x) ** 2), positions=[0.5])
    >>> line.values(), line.length
    (array([1., 4., 9.]), 2.0)
    """
    inner = unwrapped(usable(model))
    ends = [
        arrays_of(weights, inner, f"{what} set of weights of loss_line()")
        for weights, what in ((first, "first"), (second, "second"))
    ]
    with _visiting(model, measure, bn_data, batch_size, forward) as measured:
        return plots.loss_line(*ends, measured, positions=positions, names=names, progress=progress)


def loss_plane(
    model: keras.Model,
    first: Weights,
    second: Weights,
    third: Weights,
    measure: Measure,
    *,
    bn_data: Any = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    points: int | tuple[int, int] = 21,
    margin: float = 0.25,
    x: Sequence[float] | None = None,
    y: Sequence[float] | None = None,
    names: tuple[str, str, str] = ("w1", "w2", "w_SWA"),
    progress: Progress = False,
) -> plots.Plane:
    """Measures a model over the plane through three sets of weights.

    What is said of ``loss_line`` about the model, its weights and batch norm holds here too.

    Args:
      model: the model.
      first: weights, the origin.
      second: weights that the first axis points to.
      third: weights on the positive side of the second axis; the average, say.
      measure: model -> a number, or numbers by name.
      bn_data: data to recompute the batch-norm statistics from at each place.
      batch_size: for ``bn_data`` of arrays.
      forward: as for ``update_bn``.
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

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> weights = [[np.float32(w)] for w in ([[0], [0]], [[2], [0]], [[1], [1]])]
    >>> plane = loss_plane(model, *weights, lambda model: keras.ops.sum(model.layers[0].kernel),
    ...                    points=3)
    >>> plane.corners["w_SWA"], plane.at_corners["loss"]
    ((1.0, 1.0), array([0., 2., 2.]))
    """
    inner = unwrapped(usable(model))
    corners = [
        arrays_of(weights, inner, f"{what} set of weights of loss_plane()")
        for weights, what in ((first, "first"), (second, "second"), (third, "third"))
    ]
    with _visiting(model, measure, bn_data, batch_size, forward) as measured:
        return plots.loss_plane(
            *corners,
            measured,
            points=points,
            margin=margin,
            x=x,
            y=y,
            names=names,
            progress=progress,
        )


def loss_rays(
    model: keras.Model,
    center: Weights,
    measure: Measure,
    *,
    bn_data: Any = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    directions: int = 10,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    normalization: plots.Normalization = "unit",
    move_vectors: bool = True,
    name: str = "w",
    progress: Progress = False,
) -> plots.Rays:
    """Measures a model along random directions from weights: how flat it is around them.

    Frozen weights stay. To compare two sets of weights, measure both at the same ``radii`` with
    the same ``seed``. What is said of ``loss_line`` about the model, its weights and batch norm
    holds here too.

    Args:
      model: the model.
      center: weights from which the rays go.
      measure: model -> a number, or numbers by name.
      bn_data: data to recompute the batch-norm statistics from at each place.
      batch_size: for ``bn_data`` of arrays.
      forward: as for ``update_bn``.
      directions: how many rays.
      radii: where to measure along each; 0 always is. By default 11 from 0 to half the norm of the
        weights that move (for "filter": to 0.5).
      seed: of the directions; one seed gives the same ones for the same model anywhere.
      normalization: "unit": radii are distances in weight space. "filter": each filter (along the
        last axis of a kernel) moves in proportion to its norm, so that the scale of weights before
        a batch norm, which changes nothing, does not look like flatness.
      move_vectors: whether weights of one dimension or none (biases, batch norm) move.
      name: what to call the weights.
      progress: show a bar, or a function, as for ``loss_line``.

    Returns:
      The data; ``rise(amount)`` tells how far one can walk before the loss has risen by an amount.

    Raises:
      As ``loss_line``.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.4; Li et al. 2018, arXiv:1712.09913 ("filter").

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    >>> rays = loss_rays(model, [np.zeros((3, 1))], lambda model: keras.ops.sum(
    ...                  model.layers[0].kernel ** 2), directions=2, radii=[1, 2])
    >>> rays.rise(1.0).radii.round(4)
    array([1., 1.])
    """
    inner = unwrapped(usable(model))
    weights = arrays_of(center, inner, "weights of loss_rays()")
    trainable = {id(v) for v in averaged_variables(inner)}
    frozen = [path for path, v in weights_in(inner).items() if id(v) not in trainable]
    with _visiting(model, measure, bn_data, batch_size, forward) as measured:
        return plots.loss_rays(
            weights,
            measured,
            directions=directions,
            radii=radii,
            seed=seed,
            normalization=normalization,
            filter_axis=-1,
            move_vectors=move_vectors,
            # A model that is wholly frozen is only looked at, and all of it moves.
            fixed=frozen if len(frozen) < len(weights) else (),
            name=name,
            progress=progress,
        )


@contextmanager
def _visiting(
    model: Any, measure: Measure, bn_data: Any, batch_size: int, forward: Forward | None
) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A measure of weights, which puts them into the model; at the end its own are back."""
    inner = unwrapped(model)
    has_statistics = batch_norm.has_batch_norm(inner)
    if bn_data is None and has_statistics:
        warnings.warn(
            "the model has batch norm, whose statistics stay those of the weights it has now, so "
            "other weights look worse than they are. Pass bn_data=...",
            SWAWarning,
            stacklevel=4,
        )
    if bn_data is not None and (fault := fault_of(bn_data)):
        raise TypeError(f"bn_data is read again at each place. {fault}")
    if others := batch_norm.of_lookalikes(inner):
        warnings.warn(f"the curves: {others}", SWAWarning, stacklevel=4)
    recalibration = None
    if bn_data is not None and has_statistics:
        recalibration = batch_norm.Recalibration(model, forward)
    backend = current()
    variables, state = [*weights_in(inner).values()], state_variables(inner)
    live, live_state = backend.copy_state(variables), backend.copy_state(state)
    backend.keep_in_evaluation(inner)

    def measured(weights: dict[str, Any]) -> Any:
        backend.assign(variables, backend.from_numpy([*weights.values()], variables))
        # Beginning alike, random numbers included, places differ by their weights alone.
        with preserved_random(bn_data), preserved_modules(inner):
            try:
                if recalibration is not None:
                    found = recalibration.statistics(bn_data, batch_size=batch_size)
                    batch_norm.assign(found)
                return _plain(measure(model))
            finally:
                synced(inner)
                backend.assign(state, live_state)

    try:
        yield measured
    finally:
        with uninterrupted():
            # An exception inside evaluate() leaves the values outside the variables on jax, from
            # where a later sync would overwrite what is assigned now.
            synced(inner)
            backend.assign(variables, live)
            backend.assign(state, live_state)


def _plain(measured: Any) -> Any:
    """Numbers out of the backend's tensors."""
    if isinstance(measured, Mapping):
        return {name: _plain(value) for name, value in measured.items()}
    return float(current().to_numpy(measured)) if keras.ops.is_tensor(measured) else measured
