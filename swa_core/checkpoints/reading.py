"""Files that several threads read at any place, however many there are."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from swa_core.errors import StateError

# Of shards of many checkpoints there are more than a process may have open (on some systems 256).
_KEPT_OPEN = 128
_kept = 0
_lock = threading.Lock()


class RandomFile:
    """A file to read from, which is the same one until it is closed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "file")
    >>> _ = path.write_bytes(b"0123456789")
    >>> file, into = RandomFile(path), bytearray(3)
    >>> file.read_into(memoryview(into), 4), into
    (True, bytearray(b'456'))
    >>> file.close()
    """

    def __init__(self, path: Path) -> None:
        global _kept
        self._path = path
        self._seeking = threading.Lock()
        self._file: IO[bytes] | None = open(path, "rb", buffering=0)  # noqa: SIM115 - see close()
        self._identity = _identity(self._file)
        with _lock:
            self._is_counted = _kept < _KEPT_OPEN
            _kept += self._is_counted
        if not self._is_counted:
            self._file.close()
            self._file = None

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The file, at whatever place it is.

        Raises:
          StateError: another file lies there now.
        """
        if self._file is not None:
            yield self._file
            return
        with open(self._path, "rb", buffering=0) as file:
            if _identity(file) != self._identity:
                raise StateError(
                    f"{self._path.name} was changed while it was read.",
                    hint="is it still being written?",
                )
            yield file

    def read_into(self, into: memoryview, place: int) -> bool:
        """Fills ``into`` with the bytes from ``place`` on; false if there are not so many.

        Args:
          into: of bytes.
          place: the first byte [>= 0].
        """
        if self._file is not None:
            return self._fill(self._file, into, place)
        with self.opened() as file:
            return self._fill(file, into, place)

    def _fill(self, file: Any, into: memoryview, place: int) -> bool:
        while len(into):
            if hasattr(os, "preadv"):
                size = os.preadv(file.fileno(), [into], place)
            else:
                with self._seeking:
                    file.seek(place)
                    size = file.readinto(into)
            if not size:
                return False
            into, place = into[size:], place + size
        return True

    def close(self) -> None:
        """Closes it, once or more often."""
        global _kept
        if self._file is not None:
            self._file.close()
            self._file = None
        with _lock:
            _kept -= self._is_counted
            self._is_counted = False


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
