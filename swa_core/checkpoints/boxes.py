"""Stretches of a flattened tensor as boxes, for those who store it in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator

Box = tuple[slice, ...]


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[int, Box]]:
    """The boxes that a stretch of a flattened tensor consists of, each with where it begins.

    Each is one index in the first dimensions, a range in one, and everything in the others, so
    that it is a stretch of any box that it is cut with, too.

    Args:
      shape: of the tensor.
      begin: of the stretch, in elements of the flattened tensor.
      end: the element after its last.

    >>> for start, box in boxes((3, 4), 2, 10):
    ...     print(start, [(part.start, part.stop) for part in box])
    2 [(0, 1), (2, 4)]
    4 [(1, 2), (0, 4)]
    8 [(2, 3), (0, 2)]
    """
    row = math.prod(shape[1:])
    if begin >= end:
        return
    if len(shape) <= 1:
        yield begin, (slice(begin, end),) if shape else ()
        return
    first, last = -(-begin // row), end // row
    if first > last:  # inside of one row
        yield from _inside(shape, last, begin, end)
        return
    yield from _inside(shape, first - 1, begin, first * row)
    if first < last:
        whole = (slice(0, size) for size in shape[1:])
        yield first * row, (slice(first, last), *whole)
    yield from _inside(shape, last, last * row, end)


def _inside(shape: tuple[int, ...], index: int, begin: int, end: int) -> Iterator[tuple[int, Box]]:
    """The boxes of a stretch that lies in one index of the first dimension."""
    before = index * math.prod(shape[1:])
    for start, box in boxes(shape[1:], begin - before, end - before):
        yield start + before, (slice(index, index + 1), *box)


def common(box: Box, other: Box) -> Box | None:
    """What lies in both, or None.

    >>> common((slice(0, 4),), (slice(2, 9),))
    (slice(2, 4, None),)
    """
    both = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, other, strict=True)
    )
    return both if all(part.start < part.stop for part in both) else None


def within(box: Box, outer: Box) -> Box:
    """A box as counted from the beginning of one around it.

    >>> within((slice(5, 7),), (slice(4, 9),))
    (slice(1, 3, None),)
    """
    return tuple(
        slice(part.start - o.start, part.stop - o.start) for part, o in zip(box, outer, strict=True)
    )


def shape_of(box: Box) -> tuple[int, ...]:
    """The dimensions of a box."""
    return tuple(part.stop - part.start for part in box)
