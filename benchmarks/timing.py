"""Side by side: contenders run in turn, round after round, and are compared by their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that is not counted.

    >>> times = interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
    >>> [len(values) for values in times.values()]
    [3, 3]
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - begin)
    return times


def table(title: str, times: dict[str, list[float]], *, calls: int = 1) -> str:
    """Medians per call, and the ratio to the first contender: median and quartiles of the rounds.

    >>> print(table("Waiting", {"a": [1.0, 1.0, 1.0], "b": [2.0, 3.0, 2.0]}))
    Waiting
      a                                       1000.000 ms   x 1.00  (1.00 to 1.00)
      b                                       2000.000 ms   x 2.00  (2.00 to 3.00)
    """
    first = next(iter(times.values()))
    lines = [title]
    for name, values in times.items():
        low, middle, high = statistics.quantiles(
            [value / base for value, base in zip(values, first, strict=True)], n=4
        )
        milliseconds = statistics.median(values) / calls * 1000
        lines.append(
            f"  {name:38s} {milliseconds:9.3f} ms   x {middle:.2f}  ({low:.2f} to {high:.2f})"
        )
    return "\n".join(lines)
