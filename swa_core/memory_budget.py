"""How much memory may be taken: claimed before it is allocated, and refused where it is too much.

What files declare has been checked against their sizes by then; but a file may be honest and
larger than the memory. Readers and writers of any format claim what grows with their files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from swa_core.errors import StateError


class Budget:
    """What has been claimed, of how much there is.

    Attributes:
      limit: bytes; None is as much as wanted.
      claimed: bytes.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.claimed = 0

    def check(self, number: int, what: str) -> None:
        """Refuses what is too much even for a while.

        Args:
          number: of bytes.
          what: they are for, with the name of the file.

        Raises:
          StateError: that would be more than there is.

        >>> Budget(1000).check(800, "the header of a.safetensors")
        """
        if self.limit is not None and self.claimed + number > self.limit:
            raise StateError(
                f"{what} takes {number} bytes of memory, and {self.limit - self.claimed} of the "
                f"{self.limit} that are allowed are left.",
                hint="allow more (memory=..., --memory), if the files are what you think they are.",
            )

    def claim(self, number: int, what: str) -> None:
        """Claims memory that stays taken; see ``check``."""
        self.check(number, what)
        self.claimed += number


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)


def claim(number: int, what: str) -> None:
    """Claims memory of the budget that is in force, if there is one; see ``Budget.claim``."""
    budget = _current.get()
    if budget is not None:
        budget.claim(number, what)


def check(number: int, what: str) -> None:
    """Refuses what is too much for the budget in force, though it is needed only for a while."""
    budget = _current.get()
    if budget is not None:
        budget.check(number, what)


@contextmanager
def limited_to(limit: int | None) -> Iterator[Budget]:
    """Puts a budget in force for the block, and the functions called in it.

    >>> with limited_to(10) as budget:
    ...     claim(4, "this")
    >>> budget.claimed
    4
    """
    budget = Budget(limit)
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)
