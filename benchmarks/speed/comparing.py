"""What changed since another run: only what is beyond the noise of both, and large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speed.joining import Entry, Ratio, three
from speed.names import is_ours

# Noise from run to run is as large as this on a quiet machine of two cores.
LARGE = 0.15
# Copies of the weights; less is noise of the allocator.
LARGE_MEMORY = 0.1
RULE = (
    f"A ratio counts as changed where the interquartile ranges of both runs lie apart and the "
    f"medians differ by more than {LARGE:.0%}; memory, which has no rounds, where it differs by "
    f"more than {LARGE:.0%} and by more than {LARGE_MEMORY:g} copies of the weights."
)


class Change(NamedTuple):
    """A ratio that is not what it was."""

    key: str
    who: str
    old: Ratio
    new: Ratio

    def text(self) -> str:
        """As it is printed."""
        factor = self.new.median / self.old.median if self.old.median else float("inf")
        if self.old.low == self.old.high:  # memory
            return f"{self.key}: {three(self.old.median)} -> {three(self.new.median)}"
        return f"{self.key}: {self.old.text()} -> {self.new.text()}, x {three(factor)}"


@dataclass
class Comparison:
    """Two runs side by side.

    Attributes:
      against: what the other run is called.
      compared: how many ratios both have.
      regressions, improvements: changes of ours.
      others: changes of everybody else: the machine or a package is not what it was.
      gone, added: keys that only the old run, or only the new one, has.
    """

    against: str
    compared: int = 0
    regressions: list[Change] = field(default_factory=list)
    improvements: list[Change] = field(default_factory=list)
    others: list[Change] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


def changed(old: Ratio, new: Ratio, *, memory: bool = False) -> int:
    """1 if a ratio became larger, -1 if smaller, 0 if that cannot be said.

    >>> changed(Ratio(0.9, 1.0, 1.1), Ratio(1.2, 1.3, 1.4))
    1
    >>> changed(Ratio(0.9, 1.0, 1.25), Ratio(1.2, 1.3, 1.4))  # the ranges overlap
    0
    >>> changed(Ratio(0.99, 1.0, 1.01), Ratio(1.09, 1.1, 1.11))  # too little
    0
    """
    if new.median < old.median:
        return -changed(new, old, memory=memory)
    if not new.low > old.high or not new.median > (1 + LARGE) * old.median:
        return 0
    return 0 if memory and new.median - old.median <= LARGE_MEMORY else 1


def compare(
    against: str,
    old: Sequence[Entry],
    new: Sequence[Entry],
    memory: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
    parts: Sequence[str] = (),
) -> Comparison:
    """Compares two runs, ratio by ratio.

    Args:
      against: what the old run is called.
      old, new: their ratios.
      memory: copies of the weights in both runs, by "part | who | what".
      parts: those that ran now; of others nothing is said to be gone. All if empty.
    """
    of_old = {entry.key: (entry.who, entry.ratio, False) for entry in old}
    of_new = {entry.key: (entry.who, entry.ratio, False) for entry in new}
    for whole, copies in zip((of_old, of_new), memory, strict=True):
        for key, value in copies.items():
            who = key.split(" | ")[1]
            whole[f"{key} [copies]"] = (who, Ratio(value, value, value), True)
    out = Comparison(against)
    for key, (who, after, is_memory) in of_new.items():
        if key not in of_old:
            out.added.append(key)
            continue
        out.compared += 1
        before = of_old[key][1]
        sign = changed(before, after, memory=is_memory)
        if sign:
            change = Change(key, who, before, after)
            mine = out.regressions if sign > 0 else out.improvements
            (mine if is_ours(who) else out.others).append(change)
    out.gone = [
        key for key in of_old if key not in of_new and (not parts or key.split(" | ")[0] in parts)
    ]
    return out
