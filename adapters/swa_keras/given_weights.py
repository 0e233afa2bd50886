"""Weights of a model as people have them: an average, arrays, another model, a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from swa_core import AverageFile, NothingAveragedError, StructureError
from swa_core.plots import given as core
from swa_keras.averages import leaves_of
from swa_keras.averaging import Averaging
from swa_keras.backend import Variable, current, is_floating, wide
from swa_keras.lending import usable
from swa_keras.model_state import averaged_variables, is_averaged, layers_of
from swa_keras.optimizer import SWAOptimizer
from swa_keras.ranks_torch import unwrapped

# What is said of them is in the docstrings of plots.
Weights = (
    Averaging
    | SWAOptimizer
    | keras.Model
    | AverageFile
    | Mapping[str, Any]
    | Sequence[Any]
    | str
    | os.PathLike[str]
    | None
)
Array = npt.NDArray[Any]


def weights_in(model: Any) -> dict[str, Variable]:
    """The weights of a model, trainable and frozen, each once, by path.

    Raises:
      StructureError: there are none.
    """
    own = {id(v) for layer in layers_of(model) for v in layer._trainable_variables}
    variables = list({id(v): v for v in model.variables if id(v) in own}.values())
    found = [v for v in variables if is_floating(v) and is_averaged(v)]
    if not found:
        raise StructureError(f"model '{model.name}' has no floating-point weights.")
    return dict(zip(leaves_of(found), found, strict=True))


def arrays_of(given: Weights, model: Any, what: str) -> dict[str, Array]:
    """Weights for a model, as arrays of float32 or wider by the paths of its variables.

    Args:
      given: the average of a callback or an optimizer; another model; arrays in the order of
        ``trainable_variables`` or of ``get_weights()``, or by path; a safetensors file, or what was
        read of an average's; None for the weights that the model has now.
      model: that they are for, built.
      what: what they are called in messages.

    Raises:
      StructureError: of another model.
      SwappedError: an average that stands in for the weights right now.
      NothingAveragedError: an average without a snapshot.
    """
    own = weights_in(model)
    if given is None or given is model:
        return _values(own)
    if isinstance(given, (Averaging, SWAOptimizer)):
        return _in_order(_averages(given, model, what), model, own, what)
    if isinstance(given, keras.Model):
        values = _values(weights_in(unwrapped(usable(given))))
        if len(values) != len(own):
            raise _other_number(what, len(values), len(own))
        # Keras numbers names through a process, so models are matched by the order.
        return _matched(dict(zip(own, values.values(), strict=True)), own, what)
    if isinstance(given, (str, os.PathLike)) and not str(given).endswith(".safetensors"):
        raise TypeError(
            f"{what}: {os.path.basename(given)} is no safetensors file. Load it into a model of "
            "the same structure (keras.models.clone_model), and pass that"
        )
    if isinstance(given, (str, os.PathLike)):
        given = core.read(given)
    if isinstance(given, AverageFile):
        averages = core.averages_of(given)
        if given.framework == "keras":
            paths = given.extra.get("paths", list(averages))
            return _in_order([averages[path] for path in paths], model, own, what)
        given = averages
    if isinstance(given, Mapping):
        return _by_path(given, model, own, what)
    if isinstance(given, np.ndarray) or keras.ops.is_tensor(given):
        raise TypeError(f"{what}: expected all weights of the model, got one array")
    return _in_order(list(given), model, own, what)


def _averages(given: Averaging | SWAOptimizer, model: Any, what: str) -> list[Array]:
    lender = given._lender
    lender.refuse_swapped(f"read the {what}")
    if not lender.average.n_averaged:
        raise NothingAveragedError(
            f"{what}: nothing is averaged yet.",
            hint="train past the first snapshot, or start the average sooner.",
        )
    lender.average.match(averaged_variables(model), f"cannot take the {what}")
    return lender.average.arrays()


def _in_order(
    arrays: list[Any], model: Any, own: dict[str, Variable], what: str
) -> dict[str, Array]:
    """Arrays in one of the orders that a model has."""
    everything = [id(v) for v in model.weights]
    orders = (
        [id(v) for v in averaged_variables(model)],
        [id(v) for v in model.trainable_variables],
        everything,
    )
    order = next((order for order in orders if len(order) == len(arrays)), None)
    if order is None:
        raise _other_number(what, len(arrays), len(orders[0]), len(everything))
    found = dict(zip(order, arrays, strict=True))
    # What is not averaged (frozen) is the model's.
    rest = _values({path: v for path, v in own.items() if id(v) not in found})
    return _matched(
        rest | {path: found[id(v)] for path, v in own.items() if id(v) in found}, own, what
    )


def _by_path(
    found: Mapping[str, Any], model: Any, own: dict[str, Variable], what: str
) -> dict[str, Array]:
    known = set(leaves_of([v for v in model.variables if is_floating(v)]))
    if unknown := [path for path in found if path not in own and path not in known]:
        raise StructureError(
            f"{what} holds '{unknown[0]}', which the model does not have.",
            hint=f"it has {', '.join(list(own)[:4])} ...; a list of arrays in the order of its "
            "weights needs no names.",
        )
    trainable = {id(v) for v in averaged_variables(model)}
    frozen = {path: v for path, v in own.items() if id(v) not in trainable and path not in found}
    for path in own:
        if path not in found and path not in frozen:
            raise StructureError(
                f"{what} does not hold '{path}'.", hint="pass all weights of the model."
            )
    held = {path: found[path] for path in own if path in found}
    return _matched(_values(frozen) | held, own, what)


def _matched(found: Mapping[str, Any], own: dict[str, Variable], what: str) -> dict[str, Array]:
    arrays = {}
    for path, variable in own.items():
        array = np.asarray(found[path])
        if array.shape != tuple(variable.shape):
            raise StructureError(
                f"{what}: '{path}' has shape {array.shape}, and the model's "
                f"{tuple(variable.shape)}.",
                hint="pass weights of this very model.",
            )
        arrays[path] = np.array(array, wide(array.dtype.name))
    return arrays


def _values(variables: Mapping[str, Variable]) -> dict[str, Array]:
    backend = current()
    return {
        path: backend.to_numpy(keras.ops.cast(v.value, wide(v.dtype)))
        for path, v in variables.items()
    }


def _other_number(what: str, number: int, *expected: int) -> StructureError:
    return StructureError(
        f"{what}: {number} arrays, and the model has {' or '.join(map(str, expected))}.",
        hint="pass them in the order of model.trainable_variables, or what get_weights() returns.",
    )
