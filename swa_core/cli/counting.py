"""Numbers as people write and read them."""

from __future__ import annotations

import argparse
import re

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def count(text: str) -> int:
    """A whole number of weights: ``25600000``, ``25.6M``, ``7B``.

    Raises:
      ArgumentTypeError: anything else.

    >>> count("25.6M"), count("7B")
    (25600000, 7000000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGB]?)", text)
    number = round(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 25600000 or 25.6M")
    return number


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
      ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def bytes_of(number: int) -> str:
    """A size.

    >>> bytes_of(102_400_000), bytes_of(999)
    ('102 MB', '999 B')
    """
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def plural(number: int, noun: str) -> str:
    """A number and what is counted.

    >>> plural(1, "snapshot"), plural(51, "snapshot")
    ('1 snapshot', '51 snapshots')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
