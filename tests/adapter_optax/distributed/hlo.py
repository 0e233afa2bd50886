"""Reads what XLA compiled: which devices talk, and under which condition."""

from __future__ import annotations

import re
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)
_CALL = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_NAMED = re.compile(r"%([\w.\-]+)")


class Collective(NamedTuple):
    kind: str
    shape: str
    conditional: bool  # whether it stands under a condition


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised HLO module, in the order of the text."""
    bodies = _computations(text)
    always = _reached(bodies)
    return [
        Collective(found[2], found[1], name not in always)
        for name, lines in bodies.items()
        for line in lines
        if (found := _CALL.search(line))
    ]


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            lines = bodies["ENTRY" if opened[1] else opened[2]] = []
        else:
            lines.append(line)
    return bodies


def _reached(bodies: dict[str, list[str]]) -> set[str]:
    """The computations that run whatever any condition says."""
    reached, waiting = set(), ["ENTRY"]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in bodies:
            continue
        reached.add(name)
        for line in bodies[name]:
            if " conditional(" not in line:
                waiting += _NAMED.findall(line)
    return reached
