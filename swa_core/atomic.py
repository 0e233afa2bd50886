"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_BETWEEN_FLUSHES = 0.02  # seconds


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the block ends without an exception.

    It is written beside it, flushed to the disk and renamed: whoever reads meanwhile, or after the
    process or the machine was stopped, finds the old file or the new one. A link is followed, and
    the permissions of an old file are kept.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "name")
    >>> with replacing(target) as file:
    ...     written = file.write(b"all of it")
    ...     before = target.exists()
    >>> before, target.read_bytes()
    (False, b'all of it')
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def flushing(file: IO[bytes]) -> Iterator[None]:
    """Sends to the disk what a long block has written so far, again and again, beside it.

    At its end there is little left to wait for.

    Raises:
      OSError: the disk did not take it. It is told once, and so here.

    >>> with tempfile.TemporaryFile() as file, flushing(file):
    ...     file.write(b"much")
    4
    """
    done = threading.Event()
    faults: list[OSError] = []

    def flush() -> None:
        while not faults and not done.wait(_BETWEEN_FLUSHES):
            try:
                os.fsync(file.fileno())
            except OSError as fault:
                faults.append(fault)

    beside = threading.Thread(target=flush, name="flushing", daemon=True)
    beside.start()
    try:
        yield
    finally:
        done.set()
        beside.join()
    if faults:
        raise faults[0]


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that takes the place of ``path`` when the block ends without an exception.

    It is made beside it and renamed. A folder that is there cannot be replaced in one step: it is
    moved away, and goes last.

    >>> target = Path(tempfile.mkdtemp(), "name")
    >>> with replacing_folder(target) as folder:
    ...     written = Path(folder, "file").write_text("all of it")
    ...     before = target.exists()
    >>> before, sorted(file.name for file in target.iterdir())
    (False, ['file'])
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if target.exists():
            os.rename(target, Path(temporary, "old"))
        os.rename(folder, target)
        flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """The rename too has to reach the disk; where a folder cannot be opened (Windows), it does."""
    flags: Any = getattr(os, "O_DIRECTORY", None)
    if flags is None:
        return
    descriptor = os.open(folder, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
