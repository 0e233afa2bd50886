"""Checkpoints in safetensors: a file, or a folder of shards with an index."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from swa_core import safetensors_files
from swa_core.atomic import flushing, replacing, replacing_folder
from swa_core.checkpoints.containing import is_contained
from swa_core.checkpoints.digests import Layout
from swa_core.checkpoints.reading import RandomFile
from swa_core.checkpoints.tensors import Array, Checkpoint, Piece, Spec, Write
from swa_core.errors import StateError

INDEX = ".safetensors.index.json"


class SafetensorsFile:
    """One file. Only the pieces that are asked for are read."""

    is_random = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._file = RandomFile(path)
        try:
            with self._file.opened() as file:
                entries, self._metadata, self._start = safetensors_files.read_header(
                    file, path.name
                )
        except BaseException:
            self.close()
            raise
        # In the order of the data, so that reading is sequential.
        self._entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
        self.tensors: Mapping[str, Spec] = {
            name: Spec("bfloat16" if entry.is_bfloat16 else entry.dtype.name, entry.shape)
            for name, entry in self._entries.items()
        }

    def read(self, piece: Piece) -> Array:
        array = np.empty(piece.end - piece.begin, self.tensors[piece.name].storage)
        self.read_into(piece, array)
        return array

    def read_into(self, piece: Piece, array: Array) -> None:
        entry = self._entries[piece.name]
        place = self._start + entry.begin + piece.begin * entry.dtype.itemsize
        if not self._file.read_into(memoryview(array.view(np.uint8)), place):  # type: ignore[arg-type]
            raise StateError(
                f"cannot read tensor '{piece.name}' of {self.path.name}: the file became shorter.",
                hint="is it still being written?",
            )
        if not entry.dtype.isnative:
            array.byteswap(inplace=True)

    def layouts(self) -> list[Layout]:
        """Its bytes as tensors, where they are those of numbers in memory."""
        if sys.byteorder != "little":
            return []
        return [Layout(self.path, self._start, tuple(self._entries))]

    def share_with(self, other: Checkpoint) -> None:
        """Keeps one description with a checkpoint of the same layout: there may be many."""
        if isinstance(other, SafetensorsFile) and other._entries == self._entries:
            self._entries, self.tensors = other._entries, other.tensors

    def stretch(self, name: str) -> int:
        return 1

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        with replacing(path) as file, flushing(file):

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                self._write_header(file)
                for _, array in pieces:
                    file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data)

            yield write

    def close(self) -> None:
        self._file.close()

    def _write_header(self, file: IO[bytes]) -> None:
        """The header of this very file: names, places and metadata stay."""
        # What it says of itself as a running average is not true of the result.
        metadata = {key: text for key, text in self._metadata.items() if key != "swa"}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        for name, entry in self._entries.items():
            header[name] = {
                "dtype": safetensors_files.kind_of(entry),
                "shape": list(entry.shape),
                "data_offsets": [entry.begin, entry.end],
            }
        file.write(safetensors_files.packed(header))


class SafetensorsFolder:
    """Shards with an index that says which tensor lies in which."""

    is_random = True

    def __init__(self, index: Path) -> None:
        self.path = index.parent
        self._index = index
        self._shards: dict[str, SafetensorsFile] = {}
        try:
            weight_map = _weight_map(index)
            for name in dict.fromkeys(weight_map.values()):
                self._shards[name] = SafetensorsFile(_contained(index.parent, name))
            self._shard_of = {
                tensor: shard for shard in self._shards.values() for tensor in shard.tensors
            }
            _check_map(index.name, weight_map, self._shards)
        except BaseException:
            self.close()
            raise
        self.files = [shard.path for shard in self._shards.values()]
        self.tensors: Mapping[str, Spec] = {
            name: spec for shard in self._shards.values() for name, spec in shard.tensors.items()
        }

    def read(self, piece: Piece) -> Array:
        return self._shard_of[piece.name].read(piece)

    def stretch(self, name: str) -> int:
        return 1

    def read_into(self, piece: Piece, array: Array) -> None:
        self._shard_of[piece.name].read_into(piece, array)

    def layouts(self) -> list[Layout]:
        """The bytes of its shards as tensors."""
        return [layout for shard in self._shards.values() for layout in shard.layouts()]

    def share_with(self, other: Checkpoint) -> None:
        """Keeps one description with a checkpoint of the same layout: there may be many."""
        if isinstance(other, SafetensorsFolder) and [*other._shards] == [*self._shards]:
            for shard, its in zip(self._shards.values(), other._shards.values(), strict=True):
                shard.share_with(its)
            if other.tensors == self.tensors:
                self.tensors = other.tensors
            self._shard_of = {
                tensor: shard for shard in self._shards.values() for tensor in shard.tensors
            }

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        """A folder with the same shards, index and side files (configuration, tokenizer)."""
        with replacing_folder(path) as folder:

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                for name, shard in self._shards.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with shard.writing(folder / name) as write_shard:
                        write_shard(_of_shard(pieces, shard))

            yield write
            copy_beside(self.path, folder, {shard.path for shard in self._shards.values()})

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


@contextmanager
def writing_plainly(path: Path, tensors: Mapping[str, Spec]) -> Iterator[Write]:
    """Any checkpoint's tensors as one file, under their names and in their order.

    Raises:
      StateError: a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # readers for torch look for it
    place = 0
    for name, spec in tensors.items():
        is_bfloat16 = spec.dtype == "bfloat16"
        end = place + spec.bytes
        entry = safetensors_files.Entry(spec.storage, spec.shape, place, end, is_bfloat16)
        try:
            kind = safetensors_files.kind_of(entry)
        except KeyError as error:
            raise StateError(
                f"cannot write tensor '{name}': safetensors has no dtype {spec.dtype}.",
                hint="write the result in the form of the checkpoints.",
            ) from error
        header[name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [place, end]}
        place = end
    with replacing(path) as file, flushing(file):

        def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
            file.write(safetensors_files.packed(header))
            for _, array in pieces:
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data)

        yield write


def copy_beside(source: Path, target: Path, tensors: set[Path]) -> None:
    """Copies the plain files of a folder but those that hold its tensors; links stay behind."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.is_symlink() and file not in tensors:
            shutil.copy2(file, target / file.name)


def _of_shard(
    pieces: Iterator[tuple[Piece, Array]], shard: SafetensorsFile
) -> Iterator[tuple[Piece, Array]]:
    """As many of the pieces as the shard has numbers."""
    left = sum(spec.elements for spec in shard.tensors.values())
    while left:
        piece, array = next(pieces)
        yield piece, array
        left -= piece.end - piece.begin


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(
            f"cannot read {index.name}: it is no index with a weight_map ({error!r}).",
            hint="pass the folder of a sharded checkpoint, with the index that was saved with it.",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise StateError(
            f"cannot read {index.name}: its weight_map does not name a file for each tensor.",
            hint="copy it once more.",
        )
    if not found:
        raise StateError(f"{index.name} names no tensor.", hint="copy it once more.")
    return found


def _contained(folder: Path, name: str) -> Path:
    """A file inside a folder, links resolved: an index must not make anything else be read."""
    if not is_contained(folder, name):
        raise StateError(
            f"the index of {folder.name} names the file {name!r} outside of its folder.",
            hint="do not use this checkpoint unless you know who made it.",
        )
    return folder / name


def _check_map(
    index: str, weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile]
) -> None:
    held = {(tensor, name) for name, shard in shards.items() for tensor in shard.tensors}
    if wrong := sorted(set(weight_map.items()) ^ held):
        tensor, name = wrong[0]
        raise StateError(
            f"{index} and the shards disagree on tensor '{tensor}' in {name}.",
            hint="copy the checkpoint once more; its files may be of two.",
        )


def sniff(path: Path) -> Any:
    """The checkpoint at a path if it is one of these, else None."""
    if path.is_dir():
        if indices := sorted(path.glob(f"*{INDEX}")):
            return SafetensorsFolder(indices[0])
        return None
    if path.name.endswith(INDEX):
        return SafetensorsFolder(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return None
