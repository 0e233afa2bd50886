"""Side by side: contenders run in turn, round after round, and are compared by their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before_round: Callable[[], object] = lambda: None,
    before_each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that is not counted.

    What happens before a round and before each contender is not timed.

    >>> times = interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
    >>> [len(values) for values in times.values()]
    [3, 3]
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        before_round()
        for name, run in contenders.items():
            before_each()
            begin = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - begin)
    return times


def quartiles(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The ratio to a base, round by round: its lower quartile, median and upper quartile.

    >>> quartiles([2.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    (2.0, 2.0, 3.0)
    """
    ratios = [value / under for value, under in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


@dataclass
class Table:
    """Contenders' times and whatever else is known of them.

    Attributes:
      title: what was measured.
      times: seconds by contender and round.
      base: the contender whose ratio is 1; the fastest if not given.
      calls: how many calls a round's seconds are of.
      absent: contenders without figures, and why.
      about: what was measured, for programs: "kind", and of what.
      unmeasured: what is missing of contenders that have figures, and why.

    >>> out = Table("Waiting", {"a": [2.0, 2.0, 2.0], "b": [1.0, 1.0, 1.0]}, absent={"c": "ill"})
    >>> out.column("noise", {"a": 0.5}, "{:.1f}")
    >>> print(out.text())
    Waiting
                                                                                        noise
      a                                       2000.000 ms   x 2.00  (2.00 to 2.00)           0.5
      b                                       1000.000 ms   x 1.00  (1.00 to 1.00)
      c                                      ill
    """

    title: str
    times: Mapping[str, Sequence[float]]
    base: str | None = None
    calls: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    _columns: dict[str, tuple[Mapping[str, Any], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base is None:
            medians = self.medians()
            self.base = min(medians, key=medians.__getitem__)

    def medians(self) -> dict[str, float]:
        """Seconds of a call, the median of the rounds."""
        return {name: statistics.median(all_) / self.calls for name, all_ in self.times.items()}

    def fastest(self) -> dict[str, float]:
        """The ratio of the fastest rounds, which other work on the machine disturbs the least."""
        assert self.base is not None
        least = {name: min(seconds) for name, seconds in self.times.items()}
        return {name: seconds / least[self.base] for name, seconds in least.items()}

    def column(self, heading: str, values: Mapping[str, Any], shown: str) -> None:
        """Adds a column: a value by contender, and the format it is shown in."""
        self._columns[heading] = (values, shown)

    def text(self) -> str:
        """The table as it is printed."""
        assert self.base is not None
        heads = "".join(f"{heading:>10s}" for heading in self._columns)
        lines = [self.title, *([" " * 79 + heads] if heads else [])]
        for name, seconds in self.medians().items():
            low, middle, high = quartiles(self.times[name], self.times[self.base])
            ratio = f"x {middle:.2f}  ({low:.2f} to {high:.2f})"
            more = "".join(
                f"{shown.format(values[name]) if name in values else '':>10s}"
                for values, shown in self._columns.values()
            )
            lines.append(f"  {name:38s} {seconds * 1000:9.3f} ms   {ratio:26s}{more}")
        lines.extend(f"  {name:38s} {reason}" for name, reason in self.absent.items())
        return "\n".join(line.rstrip() for line in lines)

    def figures(self) -> dict[str, Any]:
        """All of it, for JSON."""
        assert self.base is not None
        rows = {}
        for name, seconds in self.medians().items():
            low, middle, high = quartiles(self.times[name], self.times[self.base])
            rows[name] = {
                "seconds": seconds,
                "rounds": [value / self.calls for value in self.times[name]],
                "ratio": {"low": low, "median": middle, "high": high},
                **{
                    key: column[name]
                    for key, (column, _) in self._columns.items()
                    if name in column
                },
            }
        return {
            "title": self.title,
            **self.about,
            "base": self.base,
            "rows": rows,
            "absent": dict(self.absent),
            "unmeasured": self.unmeasured,
        }


def table(title: str, times: Mapping[str, Sequence[float]], *, calls: int = 1) -> str:
    """Medians per call, and the ratio to the first contender: median and quartiles of the rounds.

    >>> print(table("Waiting", {"a": [1.0, 1.0, 1.0], "b": [2.0, 3.0, 2.0]}))
    Waiting
      a                                       1000.000 ms   x 1.00  (1.00 to 1.00)
      b                                       2000.000 ms   x 2.00  (2.00 to 3.00)
    """
    return Table(title, times, next(iter(times)), calls).text()
