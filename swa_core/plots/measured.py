"""What curves of any kind have in common: named measures at places, to be saved and drawn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from swa_core.plots import saving

Floats = npt.NDArray[np.float64]


def frozen_array(values: Any) -> Floats:
    """A read-only copy in float64.

    >>> frozen_array([1, 2]).flags.writeable
    False
    """
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


def refuse_unordered(places: Floats, name: str) -> None:
    """Raises ``ValueError`` for places that are not finite numbers, each above the last."""
    if places.ndim != 1 or not np.isfinite(places).all() or (np.diff(places) <= 0).any():
        raise ValueError(f"{name} must be increasing numbers, of one dimension")


class Measured:
    """The base of ``Line``, ``Plane`` and ``Rays``, which are dataclasses with ``measures``."""

    kind: ClassVar[str]
    measures: Mapping[str, Floats]

    def _freeze(self, places: Iterable[str], shape: tuple[int, ...] | None = None) -> None:
        """Turns fields into read-only arrays, and checks the shapes of the measures."""
        for name in places:
            object.__setattr__(self, name, frozen_array(getattr(self, name)))
        measures = {str(key): frozen_array(values) for key, values in self.measures.items()}
        object.__setattr__(self, "measures", measures)
        shape = self._shape() if shape is None else shape
        if not measures:
            raise ValueError("there are no measures")
        for key, values in measures.items():
            if values.shape != shape:
                raise ValueError(f"measure '{key}' has shape {values.shape}, the places {shape}")

    def _shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @classmethod
    def _read(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor out of what JSON made of them."""
        raise NotImplementedError

    def values(self, measure: str | None = None) -> Floats:
        """The values of a measure; by default of the first.

        Raises:
          KeyError: no measure of that name.
        """
        return self.measures[self.named(measure)]

    def named(self, measure: str | None) -> str:
        """The name of a measure; by default the first.

        Raises:
          KeyError: there is none of that name.
        """
        if measure is None:
            return next(iter(self.measures))
        if measure not in self.measures:
            raise KeyError(f"no measure {measure!r}; there are {list(self.measures)}")
        return measure

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON: NaN is None, infinities are strings."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            "kind": self.kind,
            "version": saving.VERSION,
            **{name: saving.plain(value) for name, value in found.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_dict`` made a dictionary of.

        Raises:
          StateError: it is none, damaged, newer, or of another kind of curve.
        """
        return saving.built(cls, saved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all; ``plots.load`` reads it.

        Raises:
          OSError: it cannot be written; an older one is still there.
        """
        saving.save(path, self.to_dict())
