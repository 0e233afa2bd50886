"""What a Keras model holds: the weights that are averaged, and the state beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from swa_keras.backend import Variable, is_floating
from swa_keras.wrapped_optimizers import innermost, may_leave_out

_QUANTISED = ("int8", "uint8")  # int4 comes packed into these; seeds and counters are wider


def synced(model: Any) -> Any:
    """The model with its values in its variables.

    Between two steps of ``fit`` the jax backend keeps them elsewhere: reading then fails and
    assigning is lost.
    """
    if keras.backend.backend() == "jax" and hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    return model


def averaged_variables(model: Any) -> list[Variable]:
    """The trainable floating-point variables, each once however many layers share it."""
    return [v for v in _once(model.trainable_variables) if is_averaged(v)]


def is_averaged(variable: Variable) -> bool:
    """Whether a trainable variable is a weight.

    The scales of float8 layers are trainable by name alone: their "gradient" is the new value,
    read off the newest activations. They stay those of the training, as in Keras' own averaging.
    """
    return is_floating(variable) and not variable.overwrite_with_gradient


def state_variables(model: Any) -> list[Variable]:
    """What a forward pass may change: running statistics, seeds, states of RNNs - and not
    weights at rest.

    Frozen and quantised weights are non-trainable variables too, but nothing changes them, and
    copying a frozen backbone at every validation would cost a lot.
    """
    weights = {id(v) for layer in layers_of(model) for v in layer._trainable_variables}
    return [
        v
        for v in _once([*model.non_trainable_variables, *_rnn_states(model)])
        if id(v) not in weights and v.dtype not in _QUANTISED
    ]


def _rnn_states(model: Any) -> list[Variable]:
    """The states of stateful RNNs, which Keras leaves out of a model's variables."""
    return [
        state
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.RNN) and layer.stateful
        for state in keras.tree.flatten(layer.states)
        if isinstance(state, keras.Variable)
    ]


def layers_of(model: Any) -> list[Any]:
    """The model and all layers in it at any depth, each once."""
    return _once(model._flatten_layers(include_self=True, recursive=True))


def lora_layers(model: Any) -> list[Any]:
    """The layers that train a product of two factors in place of their kernel."""
    return [layer for layer in layers_of(model) if getattr(layer, "lora_enabled", False)]


def inner_optimizer(model: Any) -> Any:
    """The optimizer that makes the updates; others may wrap it. None without one."""
    return innermost(getattr(model, "optimizer", None))


def is_loss_scaled(model: Any) -> bool:
    """Whether the optimizer may leave out updates because gradients overflowed."""
    return may_leave_out(getattr(model, "optimizer", None))


def _once(things: Iterable[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())
