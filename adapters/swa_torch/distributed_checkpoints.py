"""Folders of torch.distributed.checkpoint, for ``swa average``: what ranks saved, put together."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from swa_core.atomic import replacing_folder
from swa_core.checkpoints import EVERYTHING, Spec
from swa_core.checkpoints.boxes import Box, boxes, common, shape_of, within
from swa_core.checkpoints.parts import part
from swa_core.checkpoints.safetensors_format import copy_beside
from swa_core.checkpoints.tensors import Array, Piece, Write
from swa_core.errors import StateError
from swa_torch import distributed_metadata, saved_tensors
from swa_torch.distributed_metadata import Chunk, Stored, broken

_FILE = "__0_0.distcp"  # as one rank with one thread names it


def open_checkpoint(
    path: Path, key: str | None = None, trust: bool = False
) -> DistributedFolder | None:
    """The tensors of a folder, or None if it is none of torch.distributed.checkpoint.

    Args:
      path: of the folder.
      key: the part of the state dict that is meant, such as "model"; dots lead deeper. Where there
        is an optimizer's state beside the weights, one has to be named; "*" is everything.
      trust: whether its description, a pickle, may be read.

    Raises:
      StateError: it is not trusted; damaged; or has no such part.
    """
    if not (path / distributed_metadata.FILE).is_file():
        return None
    if not trust:
        raise StateError(
            f"{path.name} is a folder of torch.distributed.checkpoint, whose "
            f"{distributed_metadata.FILE} is a pickle: reading one can run code.",
            hint="if you know who made it, say --trust (trust=True).",
        )
    return DistributedFolder(path, key)


class DistributedFolder:
    """Tensors by name, put together from the chunks that the ranks have saved.

    Only the pieces that are asked for are read. Entries that are no tensors are not unpickled; a
    result has those of the first checkpoint.
    """

    is_random = True

    def __init__(self, path: Path, key: str | None) -> None:
        self.path = path
        described = distributed_metadata.read(path)
        self._full = _part(path, described, key)  # names in the folder, by names in the part
        self._described = described
        self._chunks: dict[str, list[tuple[Box, Chunk, saved_tensors.Laid]]] = {}
        names = sorted(
            (name for name, full in self._full.items() if full in described.tensors),
            key=lambda name: _place(described.tensors[self._full[name]][1]),
        )
        # In the order of the data, so that reading is sequential.
        self.tensors: Mapping[str, Spec] = {
            name: described.tensors[self._full[name]][0] for name in names
        }
        for name, spec in self.tensors.items():
            chunks = described.tensors[self._full[name]][1]
            self._chunks[name] = [
                (_box(chunk), chunk, self._laid(name, spec, chunk)) for chunk in chunks
            ]
        stored = [
            *(chunk.stored for _, chunks in described.tensors.values() for chunk in chunks),
            *described.others.values(),
        ]
        names = sorted({place.file for place in stored})
        self.files = [path / name for name in (distributed_metadata.FILE, *names)]

    def read(self, piece: Piece) -> Array:
        spec = self.tensors[piece.name]
        result = np.empty(piece.end - piece.begin, spec.storage)
        for begin, box in boxes(spec.shape, piece.begin, piece.end):
            shape = shape_of(box)
            place = begin - piece.begin
            target = result[place : place + int(np.prod(shape))].reshape(shape)
            for held, chunk, laid in self._chunks[piece.name]:
                if (both := common(box, held)) is not None:
                    numbers = self._numbers(spec, within(both, held), chunk, laid)
                    target[within(both, box)] = numbers
        return result

    def stretch(self, name: str) -> int:
        # What does not lie in order (channels_last) is read as a whole.
        whole = any(laid.strides is not None for _, _, laid in self._chunks[name])
        return self.tensors[name].elements if whole else 1

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        """A folder with the same entries of this part, as one rank would have saved it."""
        with replacing_folder(path) as folder, open(folder / _FILE, "xb") as file:
            stored: dict[dcp.MetadataIndex, _StorageInfo] = {}

            def keep(name: str, offset: tuple[int, ...] | None, begin: int, length: int) -> None:
                index = dcp.MetadataIndex(name, offset, None if offset is None else 0)
                stored[index] = _StorageInfo(_FILE, begin, length)

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                for name, place in self._others().items():
                    begin = file.tell()
                    self._copy(place, file)
                    keep(name, None, begin, place.length)
                for name, spec in self.tensors.items():
                    begin = file.tell()
                    length = saved_tensors.write(file, spec, _arrays(pieces, spec))
                    keep(self._full[name], (0,) * len(spec.shape), begin, length)

            yield write
            file.flush()
            described = dcp.Metadata(
                {
                    **{name: dcp.BytesStorageMetadata() for name in self._others()},
                    **{self._full[name]: _metadata(spec) for name, spec in self.tensors.items()},
                },
                {name: self._described.paths[name] for name in self._full.values()},
                stored,
                dcp.StorageMeta(),
            )
            (folder / distributed_metadata.FILE).write_bytes(pickle.dumps(described))
            copy_beside(self.path, folder, set(self.files))

    def close(self) -> None:
        """Its files are open only while they are read: there may be thousands of them."""

    def _others(self) -> dict[str, Stored]:
        return {
            full: self._described.others[full]
            for full in self._full.values()
            if full in self._described.others
        }

    def _laid(self, name: str, spec: Spec, chunk: Chunk) -> saved_tensors.Laid:
        place = chunk.stored
        try:
            with open(self.path / place.file, "rb", buffering=0) as file:
                return saved_tensors.laid(
                    file, place.begin, place.length, Spec(spec.dtype, chunk.sizes)
                )
        except OSError:
            raise
        except Exception as error:  # whatever zipfile and pickle make of bytes that are none
            raise broken(
                self.path, f"tensor '{name}' in {place.file} is damaged ({error})"
            ) from error

    def _numbers(self, spec: Spec, box: Box, chunk: Chunk, laid: saved_tensors.Laid) -> Array:
        """A box of a chunk, which is a stretch of it; or of one that does not lie in order, a box
        of all of it."""
        shape = shape_of(box)
        if laid.strides is not None:
            whole = self._read(spec, chunk, laid.begin, laid.span)
            itemsize = spec.storage.itemsize
            strides = [stride * itemsize for stride in laid.strides]
            return np.lib.stride_tricks.as_strided(whole, chunk.sizes, strides)[box]
        first = int(np.ravel_multi_index([part.start for part in box], chunk.sizes)) if box else 0
        begin = laid.begin + first * spec.storage.itemsize
        return self._read(spec, chunk, begin, int(np.prod(shape))).reshape(shape)

    def _read(self, spec: Spec, chunk: Chunk, begin: int, elements: int) -> Array:
        array = np.empty(elements, spec.storage)
        with open(self.path / chunk.stored.file, "rb", buffering=0) as file:
            if os.preadv(file.fileno(), [memoryview(array.view(np.uint8))], begin) != array.nbytes:
                raise broken(self.path, f"its file {chunk.stored.file} became shorter")
        return array

    def _copy(self, place: Stored, target: IO[bytes]) -> None:
        with open(self.path / place.file, "rb") as file:
            file.seek(place.begin)
            left = place.length
            while left:
                content = file.read(min(left, 1 << 20))
                if not content:
                    raise broken(self.path, f"its file {place.file} became shorter")
                target.write(content)
                left -= len(content)


def _part(path: Path, described: distributed_metadata.Described, key: str | None) -> dict[str, str]:
    """The entries of a part: their names in the folder, by their names in the part."""
    paths = {name: described.paths[name] for name in described.tensors}
    chosen = part(path.name, paths, key, ".")
    if key in (None, EVERYTHING):
        return chosen | {name: name for name in described.others}
    before = f"{key}."
    others = [name for name in described.others if name.startswith(before)]
    return chosen | {name.removeprefix(before): name for name in others}


def _place(chunks: list[Chunk]) -> tuple[str, int]:
    return min(((chunk.stored.file, chunk.stored.begin) for chunk in chunks), default=("", 0))


def _box(chunk: Chunk) -> Box:
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )


def _arrays(pieces: Iterator[tuple[Piece, Array]], spec: Spec) -> Iterator[Array]:
    """As many of the pieces as a tensor has numbers."""
    left = spec.elements
    while left:
        piece, array = next(pieces)
        yield array
        left -= piece.end - piece.begin


def _metadata(spec: Spec) -> dcp.TensorStorageMetadata:
    size = torch.Size(spec.shape)
    chunk = dcp.ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return dcp.TensorStorageMetadata(
        dcp.TensorProperties(dtype=getattr(torch, spec.dtype)), size, [chunk]
    )
