"""Growth: the points of a part, and what was fitted to them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speed.fits import Fit, exponent, per_tensor


@dataclass
class Curve:
    """One contender along one axis.

    Attributes:
      part: the benchmark it is of.
      grows: "weights" or "tensors".
      fixed: how many there are of the other.
      who: the contender.
      sizes: of the points.
      seconds: lower quartile, median and upper quartile of a snapshot at each size.
      exponent: of the power law through the medians.
      per_tensor: microseconds for each tensor, where tensors grow.
    """

    part: str
    grows: str
    fixed: int
    who: str
    sizes: list[int]
    seconds: list[tuple[float, float, float]]
    exponent: Fit | None = None
    per_tensor: Fit | None = None


def curves(part: str, grown: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A curve for each contender and axis of a part, fitted."""
    out: dict[tuple[str, str], Curve] = {}
    for axis in grown:
        for table in axis["tables"]:
            for who, row in table["rows"].items():
                curve = out.setdefault(
                    (axis["grows"], who), Curve(part, axis["grows"], axis["fixed"], who, [], [])
                )
                low, middle, high = statistics.quantiles(row["rounds"], n=4)
                curve.sizes.append(table["size"])
                curve.seconds.append((low, middle, high))
    for curve in out.values():
        medians = [middle for _, middle, _ in curve.seconds]
        curve.exponent = exponent(curve.sizes, medians)
        if curve.grows == "tensors":
            curve.per_tensor = per_tensor(curve.sizes, medians)
    return list(out.values())


def left_out(part: str, grown: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sizes that were not measured, and why, as sentences."""
    out = []
    for axis in grown:
        for size, why in axis["left_out"].items():
            out.append(f"{part}: {size} {axis['grows']} {why}")
        sizes: dict[tuple[str, str], list[int]] = {}
        for table in axis["tables"]:
            for who, why in table["absent"].items():
                sizes.setdefault((who, why), []).append(table["size"])
        for (who, why), of in sizes.items():
            some = "" if len(of) == len(axis["tables"]) else f" {', '.join(map(str, of))}"
            out.append(f"{part},{some} {axis['grows']}: {who}: {why}")
    return out
