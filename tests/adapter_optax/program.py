"""Reading what XLA made of a function, in the text of its optimised program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      shape: of what it gives, as ``f32[2,3]`` or ``(f32[2], s32[])``.
      operation: its name, as ``copy``.
      operands: the shapes of what it is given.
      calls: the computations it runs.
      branches: those of them that are branches of a condition.
    """

    shape: str
    operation: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    branches: tuple[str, ...]


class Program:
    """The instructions of a compiled program, by the computation that holds them.

    >>> program = Program('''
    ... %double.1 (p.2: f32[2]) -> f32[2] {
    ...   %p.2 = f32[2]{0} parameter(0)
    ...   ROOT %add.3 = f32[2]{0} add(%p.2, %p.2)
    ... }
    ... ''')
    >>> program.instructions["double.1"][1].operands
    ('f32[2]', 'f32[2]')
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.instructions = {name: list(_instructions(body)) for name, body in _computations(text)}

    def under_conditions(self) -> set[str]:
        """The computations that run only where a condition says so."""
        found: set[str] = set()
        new = [name for line in self.all() for name in line.branches]
        while new:
            name = new.pop()
            if name not in found:
                found.add(name)
                new += [called for line in self.instructions[name] for called in line.calls]
        return found

    def all(self, leaving_out: set[str] = frozenset()) -> Iterator[Instruction]:
        """The instructions of all computations but some."""
        for name, lines in self.instructions.items():
            if name not in leaving_out:
                yield from lines

    def donated(self) -> set[int]:
        """The numbers of the parameters whose memory is given to a result."""
        (aliases,) = re.findall(r"input_output_alias=\{(.*?) \}, entry", self.text) or [""]
        return {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+),", aliases)}


def _computations(text: str) -> Iterator[tuple[str, str]]:
    pattern = r"^(?:ENTRY )?%([\w.-]+) \([^\n]*\{\n(.*?)^\}"
    yield from re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


def _instructions(body: str) -> Iterator[Instruction]:
    shapes: dict[str, str] = {}
    for line in body.splitlines():
        found = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line)
        if found is None:
            continue
        name, shape, operation, operands, rest = found.groups()
        shapes[name] = shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
        known = (shapes.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands))
        branches = re.findall(r"branch_computations=\{(.*?)\}", rest)
        branches += re.findall(r"(?:true|false)_computation=(%[\w.-]+)", rest)
        branches = re.findall(r"%([\w.-]+)", " ".join(branches))
        calls = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", rest)
        yield Instruction(shape, operation, (*known,), (*calls, *branches), (*branches,))
