"""The loss around weights: along a line, over a plane, along random rays. Data first, then drawn.

Everything here works on pytrees of numpy arrays and a ``measure`` of them; ``swa_torch``,
``swa_keras`` and ``swa_optax`` have functions of the same names for their models. Drawing needs
matplotlib, which is imported where something is drawn.

>>> import numpy as np
>>> from swa_core import plots
>>> def measure(weights):
...     return float((weights["w"] ** 2).sum())
>>> first, second = {"w": np.float32([1, 0])}, {"w": np.float32([-1, 0])}
>>> line = plots.loss_line(first, second, measure, positions=[0, 0.5, 1])
>>> line.values().tolist(), line.length
([1.0, 0.0, 1.0], 2.0)
"""

from swa_core.plots.curves import Barrier, Line, Rays, Rise
from swa_core.plots.directions import Direction, Normalization, random_direction
from swa_core.plots.geometry import LineThrough, PlaneThrough
from swa_core.plots.measuring import loss_line, loss_plane, loss_rays
from swa_core.plots.plane import Plane
from swa_core.plots.saving import from_dict, load

__all__ = [
    "Barrier",
    "Direction",
    "Line",
    "LineThrough",
    "Normalization",
    "Plane",
    "PlaneThrough",
    "Rays",
    "Rise",
    "from_dict",
    "load",
    "loss_line",
    "loss_plane",
    "loss_rays",
    "random_direction",
]
