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


def size(text: str) -> int:
    """A number of bytes: ``500MB``, ``2GB``, ``1.5GiB``, ``1000``.

    Raises:
      ArgumentTypeError: anything else.

    >>> size("500MB"), size("1.5GiB")
    (500000000, 1610612736)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT]?)(i?)B)?", text)
    unit = 1024 if match and match[3] else 1000
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    number = round(float(match[1]) * unit**power) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 2GiB")
    return number


def bytes_of(number: int) -> str:
    """A size.

    >>> bytes_of(102_400_000), bytes_of(999)
    ('102 MB', '999 B')
    """
    rest, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if rest < 1000:
            break
        rest, unit = rest / 1000, larger
    return f"{rest:.3g} {unit}"


def plural(number: int, noun: str) -> str:
    """A number and what is counted.

    >>> plural(1, "snapshot"), plural(51, "snapshot")
    ('1 snapshot', '51 snapshots')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
