"""The loss over the plane through three sets of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swa_core.plots.measured import Floats, Measured, frozen_array, refuse_unordered
from swa_core.plots.saving import numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Plane(Measured):
    """Measures over a grid on the plane through three sets of weights.

    Attributes:
      x: increasing, of shape (n,): distances in weight space from the first set of weights,
        towards the second.
      y: likewise, of shape (m,), orthogonal to that, on the side of the third.
      measures: by name, values of shape (m, n); NaN where there is none.
      corners: by name, the coordinates of the three sets of weights.
      at_corners: by name of the measure, the values at these three, which need not be on the grid.

    >>> plane = Plane(x=[0, 1], y=[0, 2], measures={"loss": [[1, 2], [3, 4]]},
    ...               corners={"w1": (0, 0), "w2": (1, 0), "w_SWA": (0.5, 2)},
    ...               at_corners={"loss": [1, 2, 0.5]})
    >>> plane.corners["w_SWA"], plane.values().shape
    ((0.5, 2.0), (2, 2))
    """

    kind: ClassVar[str] = "plane"

    x: Floats
    y: Floats
    measures: Mapping[str, Floats]
    corners: Mapping[str, tuple[float, float]]
    at_corners: Mapping[str, Floats]

    def __post_init__(self) -> None:
        self._freeze(["x", "y"])
        corners = {str(name): (float(x), float(y)) for name, (x, y) in self.corners.items()}
        object.__setattr__(self, "corners", corners)
        at_corners = {str(key): frozen_array(values) for key, values in self.at_corners.items()}
        object.__setattr__(self, "at_corners", at_corners)
        refuse_unordered(self.x, "x")
        refuse_unordered(self.y, "y")
        if at_corners.keys() != self.measures.keys() or any(
            values.shape != (len(corners),) for values in at_corners.values()
        ):
            raise ValueError(f"at_corners must hold {len(corners)} values of each measure")

    def _shape(self) -> tuple[int, ...]:
        return (self.y.size, self.x.size)

    @classmethod
    def _read(cls, saved: dict[str, Any]) -> dict[str, Any]:
        return {
            "x": numbers(saved["x"]),
            "y": numbers(saved["y"]),
            "measures": {key: numbers(values) for key, values in saved["measures"].items()},
            "corners": {name: tuple(numbers(place)) for name, place in saved["corners"].items()},
            "at_corners": {key: numbers(values) for key, values in saved["at_corners"].items()},
        }

    def draw(self, ax: Any = None, **options: Any) -> Any:
        """Draws with matplotlib; see ``swa_core.plots.drawing.draw_plane``. Returns the axes."""
        from swa_core.plots.drawing import draw_plane

        return draw_plane(self, ax, **options)
