"""Folders of Orbax, for ``swa average``: checkpoints of one tree, and steps of a manager."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swa_core.atomic import replacing_folder
from swa_core.checkpoints import EVERYTHING, Spec
from swa_core.checkpoints.boxes import boxes, shape_of
from swa_core.checkpoints.parts import part
from swa_core.checkpoints.safetensors_format import copy_beside
from swa_core.checkpoints.tensors import Array, Piece, Write
from swa_core.errors import StateError
from swa_optax import orbax_items
from swa_optax.orbax_items import Item, Stored

_STEP = "_CHECKPOINT_METADATA"
_IN_FLIGHT = 16_000_000  # bytes on their way into a result, or one piece


def open_checkpoint(path: Path, key: str | None = None, trust: bool = False) -> OrbaxFolder | None:
    """The arrays of a folder, or None if it is none of Orbax.

    Args:
      path: of a checkpoint, or of one step of a CheckpointManager.
      key: the part that is meant, such as "params"; slashes lead deeper. An item of a step is one,
        where it has several. Where there is an optimizer's state beside the weights, one has to be
        named; "*" is everything.
      trust: changes nothing; nothing of them is executed.

    Raises:
      StateError: damaged; has no such part; or holds several steps.
    """
    if (path / orbax_items.DESCRIPTION).is_file():
        return OrbaxFolder(path, {"": path}, key)
    items = {found.parent.name: found.parent for found in path.glob(f"*/{orbax_items.DESCRIPTION}")}
    if items:
        # A manager of one tree calls its item "default"; nobody who saved it has said so.
        named = items if len(items) > 1 else {"": next(iter(items.values()))}
        return OrbaxFolder(path, dict(sorted(named.items())), key)
    if steps := sorted(found.parent.name for found in path.glob(f"*/{_STEP}")):
        raise StateError(
            f"{path.name} holds the checkpoints {', '.join(steps[:8])}.",
            hint=f"name those to average, such as '{path.name}/*'.",
        )
    return None


class OrbaxFolder:
    """Arrays by their place in the tree (``params/dense/kernel``), read chunk by chunk.

    Orbax itself is not needed: its descriptions are JSON, its arrays those of tensorstore.
    """

    # One array at a time: two would take twice the memory, and tensorstore unpacks in threads of
    # its own.
    is_random = False

    def __init__(self, path: Path, items: Mapping[str, Path], key: str | None) -> None:
        self.path = path
        self._items = {name: Item(folder, path.name) for name, folder in items.items()}
        self._key = key
        stored: dict[str, Stored] = {}
        paths: dict[str, tuple[str, ...]] = {}
        for item, held in self._items.items():
            for array in held.arrays:
                steps = (item, *array.steps) if item else array.steps
                name = "/".join(steps)
                if name in stored:
                    raise orbax_items.broken(path.name, f"two arrays have the path '{name}'")
                stored[name], paths[name] = array, steps
        if not stored:
            raise StateError(f"{path.name} holds no arrays.", hint="name a checkpoint of weights.")
        self._stored = {n: stored[full] for n, full in part(path.name, paths, key, "/").items()}
        self.tensors: Mapping[str, Spec] = {name: a.spec for name, a in self._stored.items()}
        self.files = sorted(file for file in path.rglob("*") if file.is_file())

    def read(self, piece: Piece) -> Array:
        stored, spec = self._stored[piece.name], self.tensors[piece.name]
        result = np.empty(piece.end - piece.begin, spec.storage)
        for begin, box in boxes(spec.shape, piece.begin, piece.end):
            place, shape = begin - piece.begin, shape_of(box)
            target = result[place : place + int(np.prod(shape))]
            try:
                found = stored.array[box].read().result()
            except Exception as error:  # tensorstore's are of many kinds
                raise orbax_items.broken(
                    self.path.name, f"tensor '{piece.name}' is damaged ({_first(error)})"
                ) from error
            target[:] = np.asarray(found).reshape(-1).view(spec.storage)
        return result

    def stretch(self, name: str) -> int:
        # A chunk is unpacked as a whole, so whole rows of them are read, each once.
        return self._stored[name].row_of_chunks

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        """A folder with the same tree, dtypes and chunks, or a part of it; items that hold no
        arrays (JSON) are copied where no part was named."""
        chosen = {id(stored) for stored in self._stored.values()}
        with replacing_folder(path) as folder:
            # One transaction for many arrays: each writes the directory of a database anew.
            creating = orbax_items.tensorstore().Transaction()
            targets: dict[int, Any] = {}
            for name, item in self._items.items():
                kept = [stored for stored in item.arrays if id(stored) in chosen]
                if not kept:
                    continue
                target = folder / item.folder.relative_to(self.path)
                item.copy_description(target, partial(self._is_inside, name))
                for stored in kept:
                    targets[id(stored)] = item.created(target, stored, creating)
            targets = {key: _of_the_result(future) for key, future in targets.items()}
            _of_the_result(creating.commit_async())

            def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
                for batch in _batches(pieces):
                    writing = orbax_items.tensorstore().Transaction()
                    for piece, array in batch:
                        stored = self._stored[piece.name]
                        target = targets[id(stored)].with_transaction(writing)
                        for future in _written(target, stored, piece, array):
                            _of_the_result(future)
                    _of_the_result(writing.commit_async())

            yield write
            self._copy_step(folder)

    def close(self) -> None:
        self._stored = {}
        self._items = {}

    def _is_inside(self, item: str, steps: tuple[str, ...]) -> bool:
        """Whether something in an item is of the part that was asked for."""
        name = "/".join((item, *steps) if item else steps)
        return self._key in (None, EVERYTHING) or name.startswith(f"{self._key}/")

    def _copy_step(self, folder: Path) -> None:
        """What lies beside the items; a description of the step names those that are there."""
        if any(item.folder == self.path for item in self._items.values()):
            return
        copy_beside(self.path, folder, set())
        held = {item.folder.name for item in self._items.values()}
        for other in sorted(self.path.iterdir()):
            if self._key in (None, EVERYTHING) and other.is_dir() and other.name not in held:
                shutil.copytree(other, folder / other.name, symlinks=True)
        described = folder / _STEP
        if not described.is_file():
            return
        try:
            said = json.loads(described.read_text(encoding="utf-8"))
            if isinstance(said.get("item_handlers"), dict):
                there = {entry.name for entry in folder.iterdir()}
                said["item_handlers"] = {
                    name: value for name, value in said["item_handlers"].items() if name in there
                }
                described.write_text(json.dumps(said), encoding="utf-8")
        except (ValueError, AttributeError, RecursionError) as error:
            raise orbax_items.broken(self.path.name, f"its {_STEP} is none ({error})") from error


def _written(target: Any, stored: Stored, piece: Piece, array: Array) -> list[Any]:
    numbers = array.view(stored.array.dtype.numpy_dtype)
    futures = []
    for begin, box in boxes(stored.spec.shape, piece.begin, piece.end):
        place, shape = begin - piece.begin, shape_of(box)
        content = numbers[place : place + int(np.prod(shape))].reshape(shape)
        futures.append(target[box].write(content))
    return futures


def _batches(
    pieces: Iterator[tuple[Piece, Array]],
) -> Iterator[list[tuple[Piece, Array]]]:
    """Pieces, as many at once as may be on their way."""
    batch: list[tuple[Piece, Array]] = []
    for piece, array in pieces:
        batch.append((piece, array))
        if sum(held.nbytes for _, held in batch) > _IN_FLIGHT:
            yield batch
            batch = []
    if batch:
        yield batch


def _of_the_result(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise OSError(f"the result cannot be written: {_first(error)}") from error


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
