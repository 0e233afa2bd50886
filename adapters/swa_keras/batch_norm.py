"""Batch-norm statistics of the pooled data, exactly, for weights that no step has trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from swa_core import BatchNormError, SWAWarning
from swa_keras.backend import current
from swa_keras.batches import inputs_of
from swa_keras.model_state import layers_of, state_variables, synced

Record = tuple[Any, Any, Any, Any]


class Statistics(NamedTuple):
    """The pooled statistics of one layer, float64, a value for each channel."""

    layer: Any
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]


def update_bn(model: keras.Model, data: Any, *, batch_size: int = 32) -> None:
    """Recomputes the running statistics of batch norm for the weights the model has now.

    The statistics are those of the pooled data, in one pass: ``E[var + mean^2] - mean^2`` over
    the batches, weighted by the number of elements (by the mask, where there is one), in float64,
    with the biased variance that Keras keeps. Each batch is normalised by its own statistics on
    the way, as in training. Frozen layers and layers that ``data`` never reaches are left alone.
    Nothing else in the model changes (seeds, momentum, optimizer, metrics), and nothing at all if
    an exception is raised.

    Args:
      model: a built model. Without batch norm nothing is done, and a warning says so.
      data: training data, in any form that ``fit`` takes: arrays, a tuple (x, y), a
        tf.data.Dataset, a PyDataset, a DataLoader, a generator or list of batches.
      batch_size: for arrays; take that of the training.

    Raises:
      BatchNormError: no data, data without an end, a model that is not built, batch
        renormalisation, momentum 1, statistics with NaN or Inf. The model stays as it was.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1; Chan et al. 1983 (the pooling).

    >>> layer = keras.layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((1,)), layer])
    >>> update_bn(model, np.float32([[0], [2], [4]]), batch_size=2)
    >>> float(layer.moving_mean[0]), round(float(layer.moving_variance[0]), 4)
    (2.0, 2.6667)
    """
    if not has_batch_norm(model):
        warnings.warn(
            "update_bn: the model has no batch norm to update, so nothing was done.",
            SWAWarning,
            stacklevel=2,
        )
        return
    assign(pooled_statistics(model, data, batch_size=batch_size))


def has_batch_norm(model: Any) -> bool:
    """Whether there is anything to update: a batch-norm layer that is not frozen."""
    return bool(_layers(model))


def assign(statistics: list[Statistics]) -> None:
    """Makes pooled statistics the running ones of their layers."""
    for layer, mean, variance in statistics:
        layer.moving_mean.assign(mean.astype(np.float32))
        layer.moving_variance.assign(variance.astype(np.float32))


def pooled_statistics(model: Any, data: Any, *, batch_size: int = 32) -> list[Statistics]:
    """What ``update_bn`` assigns, without assigning it; the model is not changed."""
    synced(model)
    layers = _layers(model)
    for layer in layers:
        _check(layer)
    with current().forked_random():
        pools = _pools(model, layers, inputs_of(data, batch_size))
    found = [
        pool.statistics(layer) for layer, pool in zip(layers, pools, strict=True) if pool.count > 0
    ]
    if spoilt := [layer.name for layer, *values in found if not np.isfinite(values).all()]:
        raise BatchNormError(
            f"the statistics of {', '.join(spoilt)} would hold NaN or Inf.",
            hint="look for them in the data and in the weights.",
        )
    return found


def _pools(model: Any, layers: list[Any], inputs: Iterator[Any]) -> list[_Pool]:
    forward = current().compiled(_recorder(model, layers))
    state = [v.value for v in state_variables(model)]
    rest = [v.value for v in _other_variables(model)]
    pools = [_Pool() for _ in layers]
    batches = 0
    for x in inputs:
        if not keras.tree.flatten(x)[0].shape[0]:
            continue
        batches += 1
        records, state = forward(rest, state, x)
        for pool, calls in zip(pools, records, strict=True):
            for record in calls:
                mean, lost, variance, count = map(_float64, record)
                pool.add(mean + lost, variance, float(count[0]))
    if not batches:
        raise BatchNormError(
            "the data held no batch, so there are no batch-norm statistics.",
            hint="pass the training data; a generator can be read only once.",
        )
    return pools


class _Pool:
    """Moments of everything one layer has seen."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # the sum of squared distances from the mean

    def add(self, mean: Any, variance: Any, count: float) -> None:
        """Pools one batch with those before (Chan et al. 1983)."""
        if not count:  # everything masked
            return
        total = self.count + count
        distance = mean - self.mean
        self.squares = self.squares + variance * count + distance**2 * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def statistics(self, layer: Any) -> Statistics:
        shape = tuple(layer.moving_mean.shape)
        return Statistics(
            layer, np.reshape(self.mean, shape), np.reshape(self.squares / self.count, shape)
        )


def _layers(model: Any) -> list[Any]:
    return [
        layer
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


def _check(layer: Any) -> None:
    where = f"cannot recompute the statistics of layer '{layer.path}'"
    if not layer.built:
        raise BatchNormError(
            f"{where}: it is not built.", hint="call the model on a batch first, or model.build()."
        )
    if getattr(layer, "renorm", False):
        raise BatchNormError(
            f"{where}: batch renormalisation normalises by its running statistics even in "
            "training, so pooled ones do not replace them.",
            hint="use renorm=False, or leave out bn_data.",
        )
    if layer.momentum == 1:
        raise BatchNormError(
            f"{where}: its momentum is 1, so its statistics are meant to stay as they are.",
            hint="freeze the layer (layer.trainable = False), or choose another momentum.",
        )


def _recorder(model: Any, layers: list[Any]) -> Callable[..., Any]:
    """A pure forward pass in training mode that returns what every layer's batches look like.

    Everything the layers assign goes to a scope of its own, so no variable of the model changes;
    the state goes from one batch to the next, for fresh dropout masks.
    """
    changing, others = state_variables(model), _other_variables(model)

    def forward(rest: list[Any], state: list[Any], x: Any) -> tuple[Any, list[Any]]:
        mapping = [*zip(others, rest, strict=True), *zip(changing, state, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope, _recording(layers) as records:
            # Only a model whose call knows of training may be told, as in fit.
            model(x, **({"training": True} if model._call_has_training_arg else {}))
        return records, [scope.get_current_value(v) for v in changing]

    return forward


@contextmanager
def _recording(layers: list[Any]) -> Iterator[list[list[Record]]]:
    """Collects mean, variance and number of elements at each call of each layer.

    Taken where the layer computes them: in float32 whatever the policy, once for each call of a
    shared layer, with the mask, and whatever the momentum.
    """
    records: list[list[Record]] = [[] for _ in layers]

    def recorded(layer: Any, calls: list[Record]) -> Callable[..., Any]:
        moments = layer._moments

        def wrapper(inputs: Any, mask: Any) -> Any:
            mean, variance = moments(inputs, mask)
            calls.append(_moments(layer, inputs, mask, mean, variance))
            return mean, variance

        return wrapper

    try:
        for layer, calls in zip(layers, records, strict=True):
            vars(layer)["_moments"] = recorded(layer, calls)
        yield records
    finally:
        for layer in layers:
            vars(layer).pop("_moments", None)


def _moments(layer: Any, inputs: Any, mask: Any, mean: Any, variance: Any) -> Record:
    """Mean, what float32 lost of it, variance, and number of elements, from what Keras computed.

    Some backends take ``E[x^2] - mean^2`` in float32, of which nothing is left where the mean is
    large; and the rounding of a large mean is not small beside the distance of two batches.
    """
    count = _count(layer, inputs, mask)
    if mask is not None or layer.synchronized:  # where Keras subtracts the mean itself, or others'
        return mean, keras.ops.zeros_like(mean), variance, count
    shape = [1] * len(inputs.shape)
    shape[layer.axis] = -1
    distance = inputs - keras.ops.reshape(mean, shape)
    lost = keras.ops.mean(distance, axis=layer._reduction_axes)
    squares = keras.ops.mean(keras.ops.square(distance), axis=layer._reduction_axes)
    return mean, lost, squares - keras.ops.square(lost), count


def _count(layer: Any, inputs: Any, mask: Any) -> Any:
    """How many elements a channel's moments were taken over."""
    sizes = keras.ops.shape(inputs)
    if mask is None:
        counted = [sizes[axis] for axis in layer._reduction_axes]
        masked = keras.ops.ones((), "float32")
    else:
        # A mask has one dimension less than the inputs: the last is missing.
        counted = []
        masked = keras.ops.sum(keras.ops.cast(mask, "float32"))
    for size in counted:
        masked = masked * keras.ops.cast(size, "float32")
    return masked


def _other_variables(model: Any) -> list[Any]:
    changing = {id(v) for v in state_variables(model)}
    both = [*model.trainable_variables, *model.non_trainable_variables]
    return [v for v in {id(v): v for v in both}.values() if id(v) not in changing]


def _float64(tensor: Any) -> npt.NDArray[np.float64]:
    return current().to_numpy(tensor).astype(np.float64).reshape(-1)
