"""Batch-norm statistics of the pooled data, exactly, for weights that no step has trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import keras
import numpy as np

from swa_core import BatchNormError, NonFiniteStatisticsError, SWAWarning
from swa_keras.batches import Verbose, batches_of, tensors_of, with_bar, x_of
from swa_keras.model_state import layers_of, state_variables, synced
from swa_keras.pooling import Pool, Statistics, add_to
from swa_keras.preserving import preserved_modules, preserved_random
from swa_keras.ranks_torch import group_of, pooled_by_all, unwrapped
from swa_keras.recording import Forward, compiled, other_variables, recorder

# How layers that keep statistics of batches call them, here and elsewhere.
_NAMES = ({"moving_mean", "moving_variance"}, {"running_mean", "running_var"}, {"batch_stats"})


def update_bn(
    model: keras.Model,
    data: Any,
    *,
    batch_size: int = 32,
    steps: int | None = None,
    forward: Forward | None = None,
    verbose: Verbose = "auto",
) -> None:
    """Recomputes the running statistics of batch norm for the weights the model has now.

    The statistics are those of the pooled data, in one pass: ``E[var + mean^2] - mean^2`` over
    the batches, weighted by the number of elements (by the mask, where there is one; not by
    sample weights, which batch norm knows nothing of), in float64, with the biased variance that
    Keras keeps. Each batch is normalised by its own statistics on the way, as in training.
    Nothing else in the model changes (seeds, momentum, optimizer, metrics, states of RNNs), and
    nothing at all if an exception is raised. No random number generator moves on; only a
    tf.data.Dataset that shuffles has its next order inside itself, so pass one that does not
    shuffle if the training that uses it too is to be the same bit for bit.

    Left alone are frozen layers, layers that ``data`` never reaches or that are called with
    ``training=False``, and layers that are no ``keras.layers.BatchNormalization``: a warning names
    those that look like batch norm. SpectralNormalization does not renormalise its kernel on the
    way, because the statistics are for the kernel the model has now.

    Args:
      model: a built model. Without batch norm nothing is done, and a warning says so. Wrapped in
        torch's DistributedDataParallel, the data of all its processes is pooled, and all have to
        call this.
      data: training data, in any form that ``fit`` takes: arrays, a tuple (x, y), a
        tf.data.Dataset, a PyDataset (read by its workers, if it has some), a DataLoader, a
        generator or list of batches; or a function that returns one of these. A list of arrays
        is one of batches; for a model with several inputs, of its inputs.
      batch_size: for arrays; take that of the training.
      steps: the number of batches to read, for data without an end.
      forward: called as ``forward(model, batch)`` for every batch, where ``model(x,
        training=True)`` is not how the model is trained (a ``train_step`` of its own, batches
        that are not x, y). A batch of arrays comes as a tuple.
      verbose: "auto" and 1 show a progress bar, 2 one line at the end, 0 nothing.

    Raises:
      BatchNormError: no data, data without an end, a model that is not built, batch
        renormalisation, momentum 1, a subclass that computes its statistics by itself, or
        statistics with NaN or Inf. The model stays as it was.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1; Chan et al. 1983 (the pooling).

    >>> layer = keras.layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((1,)), layer])
    >>> update_bn(model, np.float32([[0], [2], [4]]), batch_size=2, verbose=0)
    >>> float(layer.moving_mean[0]), round(float(layer.moving_variance[0]), 4)
    (2.0, 2.6667)
    """
    if others := of_lookalikes(unwrapped(model)):
        warnings.warn(f"update_bn: {others}", SWAWarning, stacklevel=2)
    if not has_batch_norm(unwrapped(model)):
        warnings.warn(
            "update_bn: the model has no batch norm to update, so nothing was done.",
            SWAWarning,
            stacklevel=2,
        )
        return
    recalibration = Recalibration(model, forward)
    assign(recalibration.statistics(data, batch_size=batch_size, steps=steps, verbose=verbose))


def has_batch_norm(model: Any) -> bool:
    """Whether there is anything to update: a batch-norm layer that is not frozen."""
    return bool(_layers(model))


def check(model: Any) -> None:
    """Refuses what cannot be recomputed, before any data is read.

    Raises:
      BatchNormError: batch renormalisation, momentum 1, or a model that is not built.
    """
    if not model.built:
        raise BatchNormError(
            f"cannot recompute the batch-norm statistics of model '{model.name}': it is not built.",
            hint="call the model on a batch first, or model.build().",
        )
    for layer in _layers(model):
        _check(layer)


def of_lookalikes(model: Any) -> str | None:
    """Names the layers that keep statistics like batch norm's and are none that we know."""
    found = _lookalikes(model)
    if not found:
        return None
    return (
        f"{', '.join(found)} keep running statistics, but are no "
        "keras.layers.BatchNormalization: these stay those of the training weights. Recompute "
        "them in the layers' own way, with the average in the model."
    )


def assign(statistics: list[Statistics]) -> None:
    """Makes pooled statistics the running ones of their layers."""
    for layer, mean, variance in statistics:
        for variable, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            # Half precision is rounded by Keras, for numpy does not know all of it.
            wide = "float64" if variable.dtype == "float64" else "float32"
            variable.assign(value.astype(wide))


class Recalibration:
    """The pooled statistics of a model, time after time with one compiled forward pass.

    Args:
      model: the model, or what wraps it.
      forward: see ``update_bn``.
    """

    def __init__(self, model: Any, forward: Forward | None = None) -> None:
        self._wrapper = model
        self._model = unwrapped(model)
        self._forward = forward
        self._compiled: Callable[..., Any] | None = None
        self._known = self._identity()

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function cannot be copied or pickled, and is built again when needed.
        return vars(self) | {"_compiled": None}

    def serves(self, model: Any) -> bool:
        """Whether this is the model, and as it was when the forward pass was compiled.

        Like a compiled ``fit`` it does not see attributes of layers that change (the rate of a
        Dropout) until the model is compiled again.
        """
        now = self._identity() if model is self._wrapper else []
        return len(now) == len(self._known) and all(
            a is b for a, b in zip(now, self._known, strict=True)
        )

    def statistics(
        self, data: Any, *, batch_size: int = 32, steps: int | None = None, verbose: Verbose = 0
    ) -> list[Statistics]:
        """The statistics for the weights the model has now; see ``update_bn``."""
        model = synced(self._model)
        check(model)
        layers = _layers(model)
        pools = [Pool() for _ in layers]
        names = [layer.path for layer in layers]
        # A functional model knows how many inputs it has; of others, one is taken for granted.
        inputs = getattr(model, "inputs", None)
        with (
            pooled_by_all(group_of(self._wrapper), names, pools),
            preserved_random(data),
            preserved_modules(model),
        ):
            batches, number = batches_of(
                data,
                batch_size=batch_size,
                steps=steps,
                n_inputs=len(inputs) if isinstance(inputs, list) else 1,
            )
            with closing(with_bar(batches, number, verbose)) as shown:
                self._fill(pools, layers, shown, steps)
        if not any(pool.reached for pool in pools):
            warnings.warn(
                f"SWA: no batch-norm layer was in training mode on this data (the first is "
                f"'{layers[0].path}'), so the statistics stay as they are. Does the call of the "
                "model take training, and pass it on?",
                SWAWarning,
                stacklevel=3,
            )
        found = [
            pool.statistics(layer)
            for layer, pool in zip(layers, pools, strict=True)
            if pool.reached
        ]
        if spoilt := [layer.name for layer, *values in found if not np.isfinite(values).all()]:
            raise NonFiniteStatisticsError(
                f"the statistics of {', '.join(spoilt)} would hold NaN or Inf.",
                hint="look for them in the data and in the weights.",
            )
        return found

    def _fill(
        self, pools: list[Pool], layers: list[Any], batches: Iterator[Any], steps: int | None
    ) -> None:
        model, prepare = self._model, x_of if self._forward is None else tensors_of
        state = [v.value for v in state_variables(model)]
        rest = [v.value for v in other_variables(model)]
        used = 0
        for batch in batches:
            tensors = prepare(batch)
            if not keras.tree.flatten(tensors)[0].shape[0]:
                continue
            used += 1
            if self._compiled is None:
                self._compiled = compiled(model, recorder(model, layers, self._forward))
            records, state = self._compiled(rest, state, tensors)
            add_to(records, pools)
        if not used:
            raise BatchNormError(
                "the data held no batch, so there are no batch-norm statistics.",
                hint="pass the training data; a generator can be read only once.",
            )
        if steps is not None and used < steps:
            warnings.warn(
                f"update_bn: the data ran out after {used} of {steps} steps; the statistics are "
                "those of what there was.",
                SWAWarning,
                stacklevel=4,
            )

    def _identity(self) -> list[Any]:
        """What the compiled forward pass is of, to be compared object by object."""
        model = self._model
        return [
            *_layers(model),
            *state_variables(model),
            *other_variables(model),
            getattr(model, "train_function", None),
        ]


def _layers(model: Any) -> list[Any]:
    """The layers to update. One that a built model has never built is never called either."""
    return [
        layer
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and (layer.built or not model.built)
    ]


def _lookalikes(model: Any) -> list[str]:
    """Layers of others that keep what looks like statistics of batches, also those of torch and
    flax in a wrapper.

    A layer keeps them under the names that are customary; what has others is not found.
    """
    found = []
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
            continue
        names = {variable.name for variable in layer._non_trainable_variables}
        if isinstance(layer, keras.layers.TorchModuleWrapper):
            names = {name.split(".")[-1] for name, _ in layer.module.named_buffers()}
        elif isinstance(layer, keras.layers.JaxLayer) and isinstance(layer.state, dict):
            names = set(layer.state)  # the collections of flax
        if any(pair <= names for pair in _NAMES):
            found.append(f"'{layer.path}' ({type(layer).__name__})")
    return found


def _check(layer: Any) -> None:
    where = f"cannot recompute the statistics of layer '{layer.path}'"
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
