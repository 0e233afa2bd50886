"""How far a long measurement is: a bar, or a function of the caller's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = bool | Callable[[int, int], object]


@contextmanager
def counting(progress: Progress, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` measurements.

    Args:
      progress: False for nothing, True for a bar of tqdm on standard error, or a function
        ``(done, total)``.
      total: the number of measurements.

    Raises:
      ModuleNotFoundError: tqdm is not installed.

    >>> with counting(lambda done, total: print(done, "of", total), 2) as step:
    ...     step()
    1 of 2
    """
    if callable(progress):
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        yield step
    elif progress:
        try:
            tqdm: Any = importlib.import_module("tqdm.auto").tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "progress=True shows a bar of tqdm, which is not installed. "
                "Install it (pip install tqdm), or leave progress out.",
                name="tqdm",
            ) from error
        with tqdm(total=total, unit="point") as bar:
            yield lambda: bar.update()
    else:
        yield lambda: None
