"""What devices say to each other in a compiled program, and under which condition."""

from __future__ import annotations

from typing import NamedTuple

from adapter_optax.program import Program

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)


class Collective(NamedTuple):
    kind: str
    shape: str
    conditional: bool  # whether it stands under a condition


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised HLO module, in the order of the text."""
    program = Program(text)
    conditional = program.under_conditions()
    return [
        Collective(kind, line.shape, name in conditional)
        for name, lines in program.instructions.items()
        for line in lines
        if (kind := line.operation.removesuffix("-start")) in COLLECTIVES
    ]
