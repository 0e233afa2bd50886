"""SHA-256 of the files that are averaged, of the very bytes that went into the average.

Hashing costs more than averaging. So the bytes are hashed when they are read to be averaged: the
files are read once, by the threads that average. Of checkpoints whose tensors do not come in the
order of their bytes, or of which not all is read, the files are read once more.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from swa_core.checkpoints.tensors import Array, Checkpoint

_BLOCK = 1 << 20
_THREADS = 2


class Layout(NamedTuple):
    """A file whose bytes are those of tensors, but for its beginning.

    Attributes:
      path: of the file.
      start: how many bytes stand before the tensors.
      tensors: their names in the order of their bytes, which end with the file.
    """

    path: Path
    start: int
    tensors: tuple[str, ...]


class StoppedError(Exception):
    """Another thread failed."""


class Digests:
    """Hashes that pieces are added to, those of one checkpoint in their order.

    Args:
      checkpoints: all of them.
      tensors: names in the order of the pieces.
      is_read: of each checkpoint whether every piece of it will come.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], tensors: Sequence[str], is_read: Sequence[bool]
    ) -> None:
        self._turn = threading.Condition()
        self._is_stopped = False
        self._next: dict[int, int] = {}  # of each checkpoint, the piece whose turn it is
        self._hash_of: dict[int, dict[str, Any]] = {}
        self._hashes: dict[Path, Any] = {}
        self._others: list[Path] = []
        self._read_more = 0
        for place, checkpoint in enumerate(checkpoints):
            files = _layouts(checkpoint)
            names = [name for file in files for name in file.tensors]
            if not (is_read[place] and files and names == list(tensors)):
                self._others.extend(checkpoint.files)
                continue
            self._next[place] = 0
            self._hash_of[place] = of = {}
            for file in files:
                started = _started(file)
                self._hashes[file.path] = started
                of.update(dict.fromkeys(file.tensors, started))

    @property
    def bytes_more(self) -> int:
        """What is read once more to be hashed."""
        return sum(file.stat().st_size for file in self._others)

    def wants(self, place: int) -> bool:
        """Whether every piece of a checkpoint has to be added."""
        return place in self._next

    def add(self, place: int, number: int, name: str, piece: Array) -> None:
        """Adds a piece, when those before it have been added.

        Args:
          place: of the checkpoint.
          number: of the piece, counted over all tensors.
          name: of its tensor.
          piece: its bytes as they stand in the file.

        Raises:
          StoppedError: the pieces before it will not come.
        """
        with self._turn:
            # Whoever has an earlier piece has begun sooner, and waits for nobody behind.
            self._turn.wait_for(lambda: self._next[place] == number or self._is_stopped)
            if self._next[place] != number:
                raise StoppedError
        self._hash_of[place][name].update(piece.data)
        with self._turn:
            self._next[place] += 1
            self._turn.notify_all()

    def stop(self) -> None:
        """Lets nobody wait any more."""
        with self._turn:
            self._is_stopped = True
            self._turn.notify_all()

    def found(self, tell: Callable[[int], None]) -> dict[Path, str]:
        """The hashes of all files, after the last piece.

        Args:
          tell: called now and then with how many bytes of that are read.
        """
        hashes = {path: found.hexdigest() for path, found in self._hashes.items()}
        pool = ThreadPoolExecutor(_THREADS)
        try:
            futures = {path: pool.submit(self._of_file, path) for path in self._others}
            waiting = set(futures.values())
            while waiting:
                done, waiting = wait(waiting, 0.1, FIRST_EXCEPTION)
                for future in done:
                    future.result()  # which may raise
                tell(self._read_more)
            hashes |= {path: future.result() for path, future in futures.items()}
        finally:
            self.stop()
            pool.shutdown(cancel_futures=True)
        return hashes

    def _of_file(self, path: Path) -> str:
        found = hashlib.sha256()
        block = memoryview(bytearray(_BLOCK))
        with open(path, "rb", buffering=0) as stream:
            while size := stream.readinto(block):
                found.update(block[:size])
                with self._turn:
                    self._read_more += size
                    if self._is_stopped:
                        raise StoppedError
        return found.hexdigest()


def _layouts(checkpoint: Checkpoint) -> Sequence[Layout]:
    layouts: Callable[[], Sequence[Layout]] | None = getattr(checkpoint, "layouts", None)
    return layouts() if layouts is not None else ()


def _started(file: Layout) -> Any:
    found = hashlib.sha256()
    with open(file.path, "rb", buffering=0) as stream:
        left = file.start
        while left and (block := stream.read(min(left, _BLOCK))):
            found.update(block)
            left -= len(block)
    return found
