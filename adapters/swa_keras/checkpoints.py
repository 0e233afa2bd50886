"""Checkpoints of Keras, for ``swa average``: ``*.weights.h5`` and ``*.keras``."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from swa_core.atomic import replacing
from swa_core.checkpoints import EVERYTHING, Spec
from swa_core.checkpoints.tensors import Array, Piece, Write
from swa_core.errors import StateError
from swa_keras import hdf5_heaps

_WEIGHTS = "model.weights.h5"  # in a .keras file
_OPTIMIZER = "optimizer/"
_PACKED = 100  # times; Keras packs nothing, and numbers cannot be packed much


def open_checkpoint(path: Path, key: str | None = None, trust: bool = False) -> WeightsFile | None:
    """The variables in a file of Keras, or None if the file is none by its name.

    The optimizer's variables are no part of it; a result keeps those of the first checkpoint.

    Args:
      path: of the file.
      key: these have no parts.
      trust: changes nothing; nothing of them is executed.

    Raises:
      StateError: damaged, or made of anything but plain arrays; or a key was given.
    """
    if not path.is_file() or not path.name.endswith((".weights.h5", ".keras")):
        return None
    if key not in (None, EVERYTHING):
        raise StateError(f"{path.name} has no parts such as '{key}'.", hint="say no key.")
    return WeightsFile(path)


class WeightsFile:
    """Variables by their place in the file (``layers/dense/vars/0``).

    Nothing is executed: of HDF5, contiguous arrays alone are read, by their bytes; links that
    lead out of the file, and arrays that lie in others, are refused. Of a ``.keras`` file, which
    is a zip, the weights are unpacked beside the temporary files.
    """

    is_random = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._file: Any = None
        try:
            self._weights = path if path.suffix == ".h5" else self._unpacked()
            self._places = dict(_datasets(self._weights, path.name))
            self._file = open(self._weights, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, Spec] = {
            # In the order of the data, so that reading is sequential.
            name: spec
            for name, (spec, _) in sorted(self._places.items(), key=lambda item: item[1][1])
        }

    def read(self, piece: Piece) -> Array:
        spec, place = self._places[piece.name]
        array = np.empty(piece.end - piece.begin, spec.storage)
        into = memoryview(array.view(np.uint8))
        begin = place + piece.begin * spec.storage.itemsize
        if os.preadv(self._file.fileno(), [into], begin) != array.nbytes:
            raise _broken(self.path.name, f"array '{piece.name}' is truncated")
        return array

    def stretch(self, name: str) -> int:
        return 1

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        """A copy of the file, with other numbers where its variables lie."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "weights.h5")
            shutil.copyfile(self._weights, copy)

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                with open(copy, "r+b") as file:
                    for piece, array in pieces:
                        spec, place = self._places[piece.name]
                        file.seek(place + piece.begin * spec.storage.itemsize)
                        file.write(array.data)

            yield write
            with replacing(path) as target:
                if self.path.suffix == ".h5":
                    with open(copy, "rb") as file:
                        shutil.copyfileobj(file, target)
                else:
                    self._repack(copy, target)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _unpacked(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory()
        target = Path(self._temporary.name, _WEIGHTS)
        try:
            with zipfile.ZipFile(self.path) as source:
                for info in source.infolist():
                    if info.file_size > _PACKED * info.compress_size + 1_000_000:
                        raise ValueError(
                            f"its member {info.filename!r} would unfold from {info.compress_size} "
                            f"to {info.file_size} bytes"
                        )
                with source.open(_WEIGHTS) as member, open(target, "wb") as file:
                    shutil.copyfileobj(member, file)
        except Exception as error:  # whatever zipfile and zlib make of bytes that are none
            raise _broken(self.path.name, f"it is no .keras file ({error})") from error
        return target

    def _repack(self, weights: Path, target: Any) -> None:
        try:
            with zipfile.ZipFile(self.path) as source, zipfile.ZipFile(target, "w") as result:
                for info in source.infolist():
                    if info.filename == _WEIGHTS:
                        result.write(weights, info.filename)
                        continue
                    with source.open(info) as member, result.open(info, "w") as copied:
                        shutil.copyfileobj(member, copied)
        except OSError:
            raise
        except Exception as error:  # as in _unpacked
            raise _broken(self.path.name, f"it is damaged ({error})") from error


def _datasets(weights: Path, name: str) -> Iterator[tuple[str, tuple[Spec, int]]]:
    """Every array outside of the optimizer, with its place in the file."""
    size = weights.stat().st_size
    are_heaps_sound = False
    try:
        with h5py.File(weights, "r") as file:
            for path, dataset in _walk(file, "", name, seen=set()):
                if path.startswith(_OPTIMIZER):
                    continue
                said = None
                if dataset.dtype.itemsize == 2:
                    if not are_heaps_sound:
                        hdf5_heaps.check(weights)
                        are_heaps_sound = True
                    said = dataset.attrs.get("dtype")  # Keras' word for what HDF5 does not know
                yield path, _described(path, dataset, said, name, size)
    except StateError:
        raise
    except Exception as error:  # h5py's are of many kinds
        raise _broken(name, f"it is no HDF5 file of weights ({error})") from error


def _walk(group: Any, path: str, name: str, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    # A group that is linked into itself would never end.
    place = h5py.h5o.get_info(group.id).addr
    if place in seen:
        raise _broken(name, f"group '{path}' stands in it twice")
    seen.add(place)
    for key in group:
        inner = f"{path}{key}"
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise _broken(name, f"'{inner}' is a link that may lead out of it")
        item = group[key]
        if isinstance(item, h5py.Dataset):
            yield inner, item
        elif isinstance(item, h5py.Group):
            yield from _walk(item, f"{inner}/", name, seen)


def _described(path: str, dataset: Any, said: Any, name: str, size: int) -> tuple[Spec, int]:
    where = f"array '{path}'"
    place = dataset.id.get_offset()
    dtype = said if said == "bfloat16" else dataset.dtype.name
    if said != "bfloat16" and (dataset.dtype.kind not in "fciub" or not dataset.dtype.isnative):
        raise _broken(name, f"{where} has dtype {said or dataset.dtype}, which is not averaged")
    spec = Spec(dtype, tuple(dataset.shape))
    if dataset.is_virtual or dataset.external or dataset.chunks or (place is None and spec.bytes):
        raise _broken(name, f"{where} is not stored plainly, as Keras does it")
    place = place or 0
    if spec.storage.itemsize != dataset.dtype.itemsize or place + spec.bytes > size:
        raise _broken(name, f"{where} claims more than there is")
    return spec, place


def _broken(file: str, what: str) -> StateError:
    return StateError(f"cannot read {file}: {what}.", hint="save the model again with Keras.")
