"""WHEN: which updates are snapshots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """Which updates are snapshots, everything counted in updates.

    Attributes:
      start: the first snapshot [updates, >= 0]; 0 means ``every``, because the initial weights
        are never a snapshot.
      every: the distance from one snapshot to the next [updates, >= 1].
      stop: the last update that may be a snapshot [updates], or None for no end.

    >>> list(Schedule(start=10, every=4).snapshots(20))
    [10, 14, 18]
    """

    start: int
    every: int = 1
    stop: int | None = None

    def is_snapshot(self, update: Any) -> Any:
        """Whether the weights after ``update`` completed updates join the average.

        Operators only (no ``and``, ``if``, ``int()`` on ``update``), so that one definition
        serves Python, numpy and values that a compiler is tracing.

        Args:
          update: completed optimizer updates [updates, >= 0]; int, signed integer array or
            traced int32, any shape.

        Returns:
          Boolean of the same kind and shape as ``update``.

        Source:
          Izmailov et al. 2018, arXiv:1803.05407, Alg. 1; counted as in the authors' train.py.

        >>> [t for t in range(20) if Schedule(start=10, every=4, stop=None).is_snapshot(t)]
        [10, 14, 18]
        """
        due = (update > 0) & (update >= self.start) & ((update - self.start) % self.every == 0)
        return due if self.stop is None else due & (update <= self.stop)

    @property
    def first(self) -> int:
        """The first snapshot [updates]; whether it comes at all is for ``stop`` to say.

        >>> Schedule(start=0, every=4).first
        4
        """
        return self.start if self.start > 0 else self.every

    def next_after(self, update: int) -> int | None:
        """The first snapshot after ``update`` completed updates, or None when no more will come.

        What an adapter counts down to, so that an update that is no snapshot costs a decrement.

        >>> [Schedule(10, 4, 15).next_after(t) for t in (0, 9, 10, 13, 14)]
        [10, 10, 14, 14, None]
        """
        since = update - self.first
        due = self.first if since < 0 else self.first + (since // self.every + 1) * self.every
        return due if self.stop is None or due <= self.stop else None

    def snapshots(self, total_steps: int | None = None) -> range:
        """All snapshots of a training of ``total_steps`` updates, as a range.

        Args:
          total_steps: length of the training [updates]; None asks for all up to ``stop``.

        Raises:
          ValueError: neither ``total_steps`` nor ``stop`` bounds the range.

        >>> Schedule(start=10, every=4, stop=21).snapshots()
        range(10, 22, 4)
        """
        ends = [end for end in (total_steps, self.stop) if end is not None]
        if not ends:
            raise ValueError(
                "a schedule without a stop has no last snapshot; say total_steps, the number of "
                "updates of the training"
            )
        return range(self.first, max(min(ends) + 1, self.first), self.every)

    def n_snapshots(self, update: Any) -> Any:
        """How many snapshots the first ``update`` updates hold (int, or integer array).

        >>> Schedule(10, 4).n_snapshots(14)
        2
        """
        end = update if self.stop is None else np.minimum(update, self.stop)
        number = np.maximum((end - self.first) // self.every + 1, 0)
        return number if isinstance(update, np.ndarray) else int(number)

    def last(self, total_steps: int | None = None) -> int | None:
        """The last snapshot of a training of ``total_steps`` updates, or None if it has none.

        >>> Schedule(10, 4).last(20), Schedule(10, 4).last(9)
        (18, None)
        """
        snapshots = self.snapshots(total_steps)
        return snapshots[-1] if snapshots else None

    def total(self, total_steps: int | None = None) -> int:
        """The number of snapshots of a training of ``total_steps`` updates.

        >>> Schedule(10, 4).total(20)
        3
        """
        return len(self.snapshots(total_steps))
