"""Which part of a checkpoint is meant, where it holds more than weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from swa_core.errors import StateError

EVERYTHING = "*"  # the key of all parts
_OPTIMIZER = re.compile(r"opt(im(izer)?s?)?(_?states?)?")


def part(
    checkpoint: str, paths: Mapping[str, Sequence[str]], key: str | None, separator: str
) -> dict[str, str]:
    """The entries of a part by their names in it, each with its name in the checkpoint.

    Without a key it is all of it, unless there is the state of an optimizer beside the weights:
    whether that is averaged has to be said.

    Args:
      checkpoint: its name, for messages.
      paths: of its entries by name, where they stand in the nesting.
      key: what was asked for; None where nothing was.
      separator: between the steps of a name.

    Raises:
      StateError: there is no such part, or it has to be said which.

    >>> part("step-1", {"model.w": ["model", "w"], "optim.m": ["optim", "m"]}, "model", ".")
    {'w': 'model.w'}
    """
    tops = [*dict.fromkeys(str(path[0]) for path in paths.values() if path)]
    held = f"it holds {', '.join(map(repr, tops[:8]))}" + (" and more" if tops[8:] else "")
    if key is None and (found := [top for top in tops if _OPTIMIZER.fullmatch(top)]):
        raise StateError(
            f"{checkpoint} holds the state of an optimizer, '{found[0]}'.",
            hint="name the part to average (--key model, or key=...), or say --key '*' to average "
            f"that state too; {held}.",
        )
    if key is None or key == EVERYTHING:
        return {name: name for name in paths}
    before = key + separator
    inside = {name.removeprefix(before): name for name in paths if name.startswith(before)}
    if not inside:
        raise StateError(f"{checkpoint} has no part '{key}'.", hint=f"{held}.")
    return inside
