"""Checkpoints in numpy's own format: a zip file with an array in each member."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from swa_core.atomic import replacing
from swa_core.checkpoints.tensors import Array, Piece, Spec, Write
from swa_core.errors import StateError

_SUFFIX = ".npy"
# Whatever zipfile, zlib and numpy's reader of headers make of bytes that are none of theirs.
_DAMAGED = Exception


class NpzFile:
    """Arrays, stored or compressed; nothing is unpickled."""

    is_random = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._lock = threading.Lock()
        self._open: tuple[str, IO[bytes], int] | None = None  # a member, and the next element
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise _broken(path, f"it is no npz file ({error})") from error
        self._compression: dict[str, int] = {}
        found: dict[str, Spec] = {}
        try:
            for info in self._zip.infolist():
                if not info.filename.endswith(_SUFFIX):
                    raise _broken(path, f"its member {info.filename!r} is no array")
                name = info.filename.removesuffix(_SUFFIX)
                found[name] = self._spec(info)
                self._compression[name] = info.compress_type
        except BaseException:
            self._zip.close()
            raise
        self.tensors: Mapping[str, Spec] = found

    def read(self, piece: Piece) -> Array:
        spec = self.tensors[piece.name]
        with self._lock:
            itemsize = spec.storage.itemsize
            try:
                if self._open is None or self._open[0] != piece.name or self._open[2] > piece.begin:
                    self._open_member(piece.name)
                assert self._open is not None
                _, stream, place = self._open
                if place < piece.begin:
                    stream.seek((piece.begin - place) * itemsize, 1)
                content = stream.read((piece.end - piece.begin) * itemsize)
            except _DAMAGED as error:
                raise _broken(self.path, f"array '{piece.name}' is damaged ({error})") from error
            self._open = piece.name, stream, piece.end
        if len(content) != (piece.end - piece.begin) * itemsize:
            raise _broken(self.path, f"array '{piece.name}' is truncated")
        return np.frombuffer(content, spec.storage)

    def stretch(self, name: str) -> int:
        return 1

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        with replacing(path) as file, zipfile.ZipFile(file, "w") as target:

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                for name, spec in self.tensors.items():
                    info = zipfile.ZipInfo(name + _SUFFIX)
                    info.compress_type = self._compression[name]
                    with target.open(info, "w", force_zip64=True) as member:
                        head = {"descr": spec.storage.str, "fortran_order": False}
                        np.lib.format.write_array_header_1_0(member, head | {"shape": spec.shape})
                        left = spec.elements
                        while left:
                            piece, array = next(pieces)
                            member.write(array.data)
                            left -= piece.end - piece.begin

            yield write

    def close(self) -> None:
        self._zip.close()

    def _open_member(self, name: str) -> None:
        if self._open is not None:
            self._open[1].close()
        stream = self._zip.open(name + _SUFFIX)
        _read_head(stream)
        self._open = name, stream, 0

    def _spec(self, info: zipfile.ZipInfo) -> Spec:
        where = f"array '{info.filename.removesuffix(_SUFFIX)}'"
        try:
            with self._zip.open(info) as stream:
                shape, is_fortran, dtype = _read_head(stream)
                head = stream.tell()
        except _DAMAGED as error:
            raise _broken(self.path, f"{where} is damaged ({error})") from error
        if dtype.hasobject or dtype.kind not in "fciub" or not dtype.isnative:
            raise StateError(
                f"cannot read {where} of {self.path.name}: it has dtype {dtype}.",
                hint="only numbers and booleans in the machine's byte order are read.",
            )
        if is_fortran and len(shape) > 1:
            raise StateError(
                f"cannot read {where} of {self.path.name}: it is stored column by column.",
                hint="save it again after numpy.ascontiguousarray.",
            )
        spec = Spec(dtype.name, shape)
        if spec.bytes != info.file_size - head:
            raise _broken(
                self.path, f"{where} of shape {shape} cannot take {info.file_size - head} bytes"
            )
        return spec


def _read_head(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    shape, is_fortran, dtype = read(stream)
    return shape, is_fortran, dtype


def sniff(path: Path) -> Any:
    """The checkpoint at a path if it is one of these, else None."""
    return NpzFile(path) if path.suffix == ".npz" and path.is_file() else None


def _broken(path: Path, what: str) -> StateError:
    return StateError(f"cannot read {path.name}: {what}.", hint="copy it once more.")
