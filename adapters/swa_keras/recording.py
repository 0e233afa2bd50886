"""A forward pass in training mode that changes nothing, and what batch norm sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from swa_core import BatchNormError
from swa_keras.backend import current
from swa_keras.model_state import layers_of, state_variables

Forward = Callable[[Any, Any], Any]


def recorder(model: Any, layers: list[Any], forward: Forward | None) -> Callable[..., Any]:
    """A pure forward pass in training mode that returns what every layer's batches look like.

    Everything the layers assign goes to a scope of its own, so no variable of the model changes;
    the state goes from one batch to the next, for fresh dropout masks.
    """
    changing, others = state_variables(model), other_variables(model)

    def record(rest: list[Any], state: list[Any], batch: Any) -> tuple[Any, list[Any]]:
        mapping = [*zip(others, rest, strict=True), *zip(changing, state, strict=True)]
        with (
            keras.StatelessScope(state_mapping=mapping) as scope,
            _kernels_as_they_are(model),
            _recording(layers) as records,
        ):
            before = [scope.get_current_value(layer.moving_mean) for layer in layers]
            if forward is not None:
                forward(model, batch)
            else:
                # Only a model whose call knows of training may be told, as in fit.
                model(batch, **({"training": True} if model._call_has_training_arg else {}))
            for layer, calls, old in zip(layers, records, before, strict=True):
                if not calls and scope.get_current_value(layer.moving_mean) is not old:
                    raise BatchNormError(
                        f"cannot recompute the statistics of layer '{layer.path}': "
                        f"{type(layer).__name__} computes them in a call of its own.",
                        hint="let its call take them from self._moments(inputs, mask), as "
                        "BatchNormalization's does; or freeze the layer.",
                    )
        return records, [scope.get_current_value(v) for v in changing]

    return record


def compiled(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, unless the model is trained without, for some cannot be."""
    eagerly = getattr(model, "run_eagerly", False)
    if keras.backend.backend() == "jax":
        eagerly = eagerly or not getattr(model, "jit_compile", True)
    return function if eagerly else current().compiled(function)


def other_variables(model: Any) -> list[Any]:
    """The variables of the model that a forward pass does not change."""
    changing = {id(v) for v in state_variables(model)}
    both = [*model.trainable_variables, *model.non_trainable_variables]
    return [v for v in {id(v): v for v in both}.values() if id(v) not in changing]


@contextmanager
def _kernels_as_they_are(model: Any) -> Iterator[None]:
    """SpectralNormalization computes with the kernel it has, as it does in inference.

    In training each call makes the largest singular value 1; that of an average is less, and
    statistics of the normalised kernel would not fit it.
    """
    wrappers = [
        layer for layer in layers_of(model) if isinstance(layer, keras.layers.SpectralNormalization)
    ]
    try:
        for wrapper in wrappers:
            vars(wrapper)["normalized_weights"] = lambda w=wrapper: (
                w.vector_u.value,
                w.kernel.value,
            )
        yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("normalized_weights", None)


@contextmanager
def _recording(layers: list[Any]) -> Iterator[list[list[Any]]]:
    """Collects mean, variance and number of elements at each call of each layer.

    Taken where the layer computes them: in float32 whatever the policy, once for each call of a
    shared layer, with the mask, and whatever the momentum.
    """
    records: list[list[Any]] = [[] for _ in layers]

    def recorded(layer: Any, calls: list[Any]) -> Callable[..., Any]:
        moments = layer._moments

        def wrapper(inputs: Any, mask: Any) -> Any:
            mean, variance = moments(inputs, mask)
            calls.append(_record(layer, inputs, mask, mean, variance))
            return mean, variance

        return wrapper

    try:
        for layer, calls in zip(layers, records, strict=True):
            vars(layer)["_moments"] = recorded(layer, calls)
        yield records
    finally:
        for layer in layers:
            vars(layer).pop("_moments", None)


def _record(layer: Any, inputs: Any, mask: Any, mean: Any, variance: Any) -> Any:
    """Mean, what float32 lost of it, variance, and number of elements, of each channel.

    Some backends take ``E[x^2] - mean^2`` in float32, of which nothing is left where the mean is
    large; and the rounding of a large mean is not small beside the distance of two batches. What
    a subclass makes of its inputs is taken as it is.

    Returns:
      A tensor [4, channels].
    """
    ops = keras.ops
    shape = [1] * len(inputs.shape)
    shape[layer.axis] = -1
    axes = layer._reduction_axes
    known = None
    if mask is None:
        sizes = ops.shape(inputs)
        elements = ops.ones((inputs.shape[layer.axis],), inputs.dtype)
        for axis in axes:
            elements = elements * ops.cast(sizes[axis], inputs.dtype)
    else:
        known = ops.cast(ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(inputs)), "bool")
        elements = ops.sum(ops.cast(known, inputs.dtype), axis=axes)
    mean, variance = ops.reshape(mean, (-1,)), ops.reshape(variance, (-1,))
    if type(layer)._moments is not keras.layers.BatchNormalization._moments:
        return ops.stack([mean, ops.zeros_like(mean), variance, elements])
    distance = inputs - ops.reshape(mean, shape)
    if known is not None:
        distance = ops.where(known, distance, 0)
    divisor = ops.maximum(elements, 1)
    lost = ops.sum(distance, axis=axes) / divisor
    squares = ops.sum(ops.square(distance), axis=axes) / divisor
    return ops.stack([mean, lost, squares - ops.square(lost), elements])
