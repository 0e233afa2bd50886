"""The loss around a model's weights: along a line, over a plane, along random rays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from swa_core import plots
from swa_core.errors import SWAWarning
from swa_core.interrupts import uninterrupted
from swa_torch.batch_norm import update_bn
from swa_torch.given_weights import Weights, arrays_of, weights_in
from swa_torch.observing import keeps_statistics
from swa_torch.preserving import preserved

Measure = Callable[[torch.nn.Module], "float | Mapping[str, float]"]
Progress = bool | Callable[[int, int], object]


def loss_line(
    model: torch.nn.Module,
    first: Weights,
    second: Weights,
    measure: Measure,
    *,
    bn_data: Iterable[Any] | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    positions: Sequence[float] | None = None,
    names: tuple[str, str] = ("w1", "w2"),
    progress: Progress = False,
) -> plots.Line:
    """Measures a model along the line through two sets of weights.

    The model takes the weights of each place in turn, by value, and is handed to ``measure`` in
    evaluation mode and without gradients. Afterwards its weights, buffers and training flags and
    all random number generators are as before, whatever is raised; at each place they begin alike.

    A model with batch norm needs ``bn_data``: running statistics belong to the weights that they
    were gathered on. With those of one end, the other end of the line looks far worse than it is,
    and a barrier appears between weights that have none. Without it a warning says so.

    Weights can be the ``SWA`` optimizer (its average), a state dict, tensors in the order of
    ``model.parameters()``, another model, a safetensors file (an average's or a model's), or None
    for those that the model has now. Buffers in a state dict are not taken. Keep copies: the state
    dict of a model in training changes with it.

    Args:
      model: the model, on any device; wrapped or compiled, but not sharded.
      first: the weights at position 0.
      second: the weights at position 1.
      measure: model -> a number, or numbers by name (``{"test error [%]": ..., ...}``). NaN is a
        hole in the curve.
      bn_data: batches to recompute the batch-norm statistics from at each place, by ``update_bn``.
        They are read again each time, so an iterator will not do. Overflow there is a NaN.
      forward: as for ``update_bn``.
      positions: where to measure; 0 and 1 always are. By default 21, from -0.5 to 1.5.
      names: what to call the two.
      progress: show a bar (of tqdm); or a function that is called with the number of places that
        are done, and of all.

    Returns:
      The data: ``draw()`` draws them with matplotlib, ``save(path)`` writes them, ``barrier()``
      tells how far the loss rises in between.

    Raises:
      StructureError: the weights are not of this model, or it is sharded.
      GeometryError: both are the same, or hold NaN or Inf.
      NothingAveragedError, SwappedError: an optimizer without an average, or inside its
        ``averaged()``.
      BatchNormError: as ``update_bn``.
      TypeError: ``bn_data`` is an iterator, or ``measure`` does not return numbers.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x = torch.ones(4, 1)
    >>> line = loss_line(model, {"weight": torch.tensor([[1.0]])}, [torch.tensor([[3.0]])],
    ...                  lambda model: model(x).square().mean(), positions=[0.5])
    >>> line.values(), line.length
    (array([1., 4., 9.]), 2.0)
    """
    ends = [
        arrays_of(weights, model, f"{what} set of weights of loss_line()")
        for weights, what in ((first, "first"), (second, "second"))
    ]
    with _visiting(model, measure, bn_data, forward) as measured:
        return plots.loss_line(*ends, measured, positions=positions, names=names, progress=progress)


def loss_plane(
    model: torch.nn.Module,
    first: Weights,
    second: Weights,
    third: Weights,
    measure: Measure,
    *,
    bn_data: Iterable[Any] | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
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
      bn_data: batches to recompute the batch-norm statistics from at each place.
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

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> weights = [[torch.tensor([w])] for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 1.0])]
    >>> plane = loss_plane(model, *weights, lambda model: model.weight.square().sum(), points=3)
    >>> plane.corners["w_SWA"], plane.at_corners["loss"]
    ((1.0, 1.0), array([0., 4., 2.]))
    """
    corners = [
        arrays_of(weights, model, f"{what} set of weights of loss_plane()")
        for weights, what in ((first, "first"), (second, "second"), (third, "third"))
    ]
    with _visiting(model, measure, bn_data, forward) as measured:
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
    model: torch.nn.Module,
    center: Weights,
    measure: Measure,
    *,
    bn_data: Iterable[Any] | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    directions: int = 10,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    normalization: plots.Normalization = "unit",
    move_vectors: bool = True,
    name: str = "w",
    progress: Progress = False,
) -> plots.Rays:
    """Measures a model along random directions from weights: how flat it is around them.

    Frozen parameters stay. To compare two sets of weights, measure both at the same ``radii`` with
    the same ``seed``. What is said of ``loss_line`` about the model, its weights and batch norm
    holds here too.

    Args:
      model: the model.
      center: weights from which the rays go.
      measure: model -> a number, or numbers by name.
      bn_data: batches to recompute the batch-norm statistics from at each place.
      forward: as for ``update_bn``.
      directions: how many rays.
      radii: where to measure along each; 0 always is. By default 11 from 0 to half the norm of the
        weights that move (for "filter": to 0.5).
      seed: of the directions; one seed gives the same ones for the same model anywhere.
      normalization: "unit": radii are distances in weight space. "filter": each filter (row of a
        weight) moves in proportion to its norm, so that the scale of weights before a batch norm,
        which changes nothing, does not look like flatness.
      move_vectors: whether parameters of one dimension or none (biases, batch norm) move.
      name: what to call the weights.
      progress: show a bar, or a function, as for ``loss_line``.

    Returns:
      The data; ``rise(amount)`` tells how far one can walk before the loss has risen by an amount.

    Raises:
      As ``loss_line``.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.4; Li et al. 2018, arXiv:1712.09913 ("filter").

    >>> model = torch.nn.Linear(3, 1)
    >>> origin = [torch.zeros(1, 3), torch.zeros(1)]
    >>> rays = loss_rays(model, origin, lambda model: sum(p.square().sum() for p in
    ...                  model.parameters()), directions=2, radii=[1, 2])
    >>> rays.rise(1.0).radii.round(4)
    array([1., 1.])
    """
    weights = arrays_of(center, model, "weights of loss_rays()")
    frozen = [key for key, parameter in weights_in(model).items() if not parameter.requires_grad]
    with _visiting(model, measure, bn_data, forward) as measured:
        return plots.loss_rays(
            weights,
            measured,
            directions=directions,
            radii=radii,
            seed=seed,
            normalization=normalization,
            filter_axis=0,
            move_vectors=move_vectors,
            # A model that is wholly frozen is only looked at, and all of it moves.
            fixed=frozen if len(frozen) < len(weights) else (),
            name=name,
            progress=progress,
        )


@contextmanager
def _visiting(
    model: torch.nn.Module,
    measure: Measure,
    bn_data: Iterable[Any] | None,
    forward: Callable[[torch.nn.Module, Any], Any] | None,
) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A measure of weights, which puts them into the model; at the end its own are back."""
    has_statistics = any(keeps_statistics(module) for module in model.modules())
    if bn_data is None and has_statistics:
        warnings.warn(
            "the model has batch norm, whose statistics stay those of the weights it has now, so "
            "other weights look worse than they are. Pass bn_data=...",
            SWAWarning,
            stacklevel=4,
        )
    if isinstance(bn_data, Iterator):
        raise TypeError(
            "bn_data is read once for each place, and an iterator is empty after the first; pass a "
            "DataLoader or a list of batches"
        )
    parameters = weights_in(model)
    live = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def measured(weights: dict[str, Any]) -> Any:
        for name, array in weights.items():
            _write(parameters[name], torch.from_numpy(array))
        torch.clear_autocast_cache()
        # Beginning alike, random numbers included, places differ by their weights alone.
        with preserved(model, bn_data):
            if bn_data is not None and has_statistics:
                update_bn(model, bn_data, forward=forward)
            model.eval()
            with torch.no_grad():
                return measure(model)

    try:
        yield measured
    finally:
        with uninterrupted():
            for name, parameter in parameters.items():
                _write(parameter, live[name])
            torch.clear_autocast_cache()


def _write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    # Not counted by torch: in the end nothing has changed, for a backward pass that waits, or for
    # whoever watches the weights inside of averaged().
    parameter.data.copy_(value)
