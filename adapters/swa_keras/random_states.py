"""The random numbers of a training, so that one that goes on draws what it would have drawn."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from swa_core import StateError
from swa_keras.backend import current

Arrays = dict[str, npt.NDArray[Any]]


def save(model: Any) -> Arrays:
    """The seeds in the layers of a model, and the state of the generators of the process: Python's,
    numpy's (which shuffles arrays on jax) and torch's (which shuffles, and draws the dropout of
    layers that were given no seed). TensorFlow's has no state that could be read."""
    arrays = {f"seed/{n}": current().to_numpy(v.value) for n, v in enumerate(_seeds(model))}
    version, numbers, normal = random.getstate()
    arrays["python"] = np.array(numbers, np.uint32)
    arrays["python/rest"] = np.array([version, np.nan if normal is None else normal])
    _, keys, *rest = np.random.get_state()
    arrays["numpy"], arrays["numpy/rest"] = keys, np.array(rest)
    if keras.backend.backend() == "torch":
        arrays |= importlib.import_module("swa_keras.random_states_torch").save()
    return arrays


def load(model: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Goes on from there.

    Raises:
      StateError: another model.
    """
    variables = _seeds(model)
    values = [arrays[name] for name in arrays if name.startswith("seed/")]
    if [tuple(v.shape) for v in variables] != [value.shape for value in values]:
        raise StateError(
            f"the backup holds the seeds of {len(values)} random layers, and the model has "
            f"{len(variables)}.",
            hint="go on with the model that was saved, or remove the folder to begin anew.",
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    version, normal = arrays["python/rest"]
    numbers = tuple(map(int, arrays["python"]))
    random.setstate((int(version), numbers, None if np.isnan(normal) else float(normal)))
    place, has_normal, normal = arrays["numpy/rest"]
    np.random.set_state(("MT19937", arrays["numpy"], int(place), int(has_normal), float(normal)))
    if keras.backend.backend() == "torch":
        importlib.import_module("swa_keras.random_states_torch").load(arrays)


def _seeds(model: Any) -> list[Any]:
    """State of layers that is none of their weights, and not in Keras' file of weights."""
    weights = {id(v) for v in model.weights}
    return [v for v in model.non_trainable_variables if id(v) not in weights]
