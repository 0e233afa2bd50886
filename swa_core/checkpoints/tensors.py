"""A checkpoint as named tensors that are read piece by piece, whatever file they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Spec(NamedTuple):
    """What a checkpoint says of a tensor.

    Attributes:
      dtype: its name: numpy's, or "bfloat16".
      shape: its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def storage(self) -> np.dtype[Any]:
        """What numpy reads where it lies; of bfloat16 the bits."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def bytes(self) -> int:
        """How much it takes."""
        return self.elements * self.storage.itemsize

    @property
    def is_averaged(self) -> bool:
        """Whether it is floating or complex; integers and booleans are not averaged."""
        return self.dtype == "bfloat16" or self.storage.kind in "fc"


class Piece(NamedTuple):
    """A stretch of a tensor, in elements of the flattened tensor."""

    name: str
    begin: int
    end: int


# Takes the pieces of all tensors in the order of ``Checkpoint.tensors``.
Write = Callable[[Iterator[tuple[Piece, Array]]], None]


class Checkpoint(Protocol):
    """Named tensors in one file, or in the shards of a folder."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def files(self) -> list[Path]:
        """Every file that belongs to it."""

    @property
    def tensors(self) -> Mapping[str, Spec]:
        """What it holds, in the order in which it lies there."""

    def read(self, piece: Piece) -> Array:
        """A piece, one-dimensional, in ``Spec.storage``. Pieces of a tensor come in order; several
        threads may ask for those of different tensors, or of one whose ``is_random`` is true.

        A checkpoint may have more: ``read_into(piece, array)``, which fills the caller's memory;
        ``layouts()``, the files whose bytes are tensors one after the other, to be hashed while
        they are read; ``share_with(other)``, which lets go of a description that equals the
        other's; ``memory_to_write``, the bytes that ``writing`` holds at once.
        """

    @property
    def is_random(self) -> bool:
        """Whether pieces may be read in any order and by several threads."""

    def stretch(self, name: str) -> int:
        """How many elements of a tensor are best read at once: 1 where it does not matter, a whole
        row of chunks where a part of one costs as much."""

    def writing(self, path: Path) -> AbstractContextManager[Write]:
        """A checkpoint like this one, written to ``path``: whole at the end of the block, or not.

        What it gives takes the pieces of all tensors in the order of ``tensors``, flattened, in
        ``Spec.storage``; these may be kept.
        """

    def close(self) -> None:
        """Closes its files."""
