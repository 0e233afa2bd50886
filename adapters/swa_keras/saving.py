"""What a saved state holds beside counters and averages: epochs, rate, training weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swa_core import StateError
from swa_core.trees import is_inexact
from swa_keras.backend import current
from swa_keras.swapping import Swap, live_variables

_EARLIER = "load an earlier checkpoint."


class Saved(NamedTuple):
    """How far a training was when it was saved, beside its updates.

    Attributes:
      epochs: completed epochs.
      base_rate: the learning rate at the start of ``[swa.lr]``, or None.
    """

    epochs: int
    base_rate: float | None


def progress_of(saved: Mapping[str, Any]) -> Saved:
    """Epochs and base rate of a state, after checking that nothing of it is missing.

    Raises:
      StateError: truncated or damaged.
    """
    # A state that was saved before the first training knows no schedule, and no unit either.
    wanted = ["rule", "unit", "epochs", "base_rate", "live"]
    if saved.get("unit") is not None:
        wanted.append("schedule")
    if missing := [key for key in wanted if key not in saved]:
        raise StateError(
            f"the saved average is truncated: {', '.join(missing)} missing.", hint=_EARLIER
        )
    epochs, base_rate = saved["epochs"], saved["base_rate"]
    try:
        progress = Saved(operator.index(epochs), None if base_rate is None else float(base_rate))
    except (TypeError, ValueError):
        progress = Saved(-1, None)
    if progress.epochs < 0 or not math.isfinite(progress.base_rate or 0.0):
        raise StateError(
            f"the saved average is damaged: epochs is {epochs!r} and base_rate {base_rate!r}, and "
            "should be a whole number, and a number or None.",
            hint=_EARLIER,
        )
    return progress


def plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Half precision as float32, which every format can hold and which loses nothing."""
    narrow = array.dtype.itemsize < 4 and is_inexact(array.dtype)
    return array.astype(np.float32) if narrow else array


def saved_live(swap: Swap | None) -> dict[str, list[npt.NDArray[Any]]] | None:
    """The training weights and the state beside them, as far as they wait outside the model."""
    if swap is None:
        return None
    to_numpy = current().to_numpy
    weights, state = ([plain(to_numpy(tensor)) for tensor in kept] for kept in swap.live)
    return {"weights": weights, "state": state}


def live_of(saved: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """The values of the trained and of the other variables; None if not saved while swapped."""
    live = saved.get("live")
    if live is None:
        return None
    try:
        return [*map(np.array, live["weights"])], [*map(np.array, live["state"])]
    except (KeyError, TypeError) as error:
        raise StateError(
            "the saved average is truncated: its training weights are missing.", hint=_EARLIER
        ) from error
    except ValueError as error:
        raise StateError(
            f"the saved average is damaged: its training weights are no arrays ({error}).",
            hint=_EARLIER,
        ) from error


def check_live(model: Any, live: tuple[list[Any], list[Any]]) -> None:
    """Raises ``StateError`` unless the saved values have the shapes of the model's variables."""
    for variables, values in zip(live_variables(model), live, strict=True):
        wanted = [tuple(v.shape) for v in variables]
        found = [value.shape for value in values]
        if wanted != found:
            raise StateError(
                f"the saved training weights have shapes {found}, and the model has {wanted}.",
                hint="load it into the model it was saved with.",
            )


def give_back(model: Any, live: tuple[list[Any], list[Any]]) -> None:
    """Assigns saved values that were checked."""
    for variables, values in zip(live_variables(model), live, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
