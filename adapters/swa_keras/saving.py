"""The training weights inside a state that was saved while the average stood in for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from swa_core import StateError
from swa_core.trees import is_inexact
from swa_keras.swapping import live_variables


def plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Half precision as float32, which every format can hold and which loses nothing."""
    narrow = array.dtype.itemsize < 4 and is_inexact(array.dtype)
    return array.astype(np.float32) if narrow else array


def live_of(saved: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """The values of the trained and of the other variables; None if not saved while swapped."""
    live = saved.get("live")
    if live is None:
        return None
    try:
        return [*map(np.array, live["weights"])], [*map(np.array, live["state"])]
    except (KeyError, TypeError) as error:
        raise StateError(
            "the saved average is truncated: its training weights are missing.",
            hint="load an earlier checkpoint.",
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
