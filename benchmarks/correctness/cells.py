"""What stands in a table: a short text, and whether it is what the question calls right."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """An answer.

    Attributes:
      text: what was observed.
      right: whether that is right by the question's own text, None where there is nothing to judge.
      value: the number, where it is one.
      kind: "observed", "not applicable", "raised", "absent" or "crashed".
    """

    text: str
    right: bool | None = None
    value: float | None = None
    kind: str = "observed"


class NotApplicableError(Exception):
    """A question that a peer cannot be asked; the message says why in a few words."""


def not_applicable(why: str) -> Cell:
    """For questions that make no sense for a peer."""
    return Cell(f"- {why}", kind="not applicable")


def raised(error: BaseException, *, during: str = "") -> Cell:
    """The class and the first words of an error."""
    return Cell(f"{during}{brief(error)}", right=False, kind="raised")


def brief(error: BaseException) -> str:
    """An error in a line.

    >>> brief(ValueError("no such thing as a free\\nlunch in this town or in the next"))
    'ValueError: no such thing as a free lunch in…'
    """
    words = str(error).split()
    text = " ".join(words[:8]) + ("…" if len(words) > 8 else "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def number(value: float) -> str:
    """Two digits, as short as they come.

    >>> [number(value) for value in (0.0, 1.44e-06, 0.57, float("nan"))]
    ['0', '1.4e-6', '5.7e-1', 'nan']
    """
    if value == 0.0:
        return "0"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
