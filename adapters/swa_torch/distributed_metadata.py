"""What the ``.metadata`` of a torch.distributed.checkpoint folder says, as plain numbers.

It is a pickle, and reading one can run anything. Hence it is read only where somebody said that it
is trusted; and even then no class of it is made, and no function called, but the few it consists
of, for which there are stand-ins here that do nothing.
"""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swa_core.checkpoints import Spec
from swa_core.checkpoints.containing import is_contained
from swa_core.errors import StateError
from swa_torch.checkpoints import DTYPES

FILE = ".metadata"
_NAMES = frozenset(DTYPES.values())


class Stored(NamedTuple):
    """Where in a folder's files something lies, as torch.save has written it.

    Attributes:
      file: in the folder.
      begin: its first byte.
      length: in bytes.
    """

    file: str
    begin: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor: what one rank has saved of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Stored


class Described(NamedTuple):
    """What a folder holds.

    Attributes:
      tensors: with their chunks, which have been found to make up the whole.
      others: entries that are no tensors; they are never read, only copied.
      paths: where each entry stands in the nested state dict that was saved.
    """

    tensors: dict[str, tuple[Spec, list[Chunk]]]
    others: dict[str, Stored]
    paths: dict[str, tuple[Any, ...]]


def read(folder: Path) -> Described:
    """Reads the description of a folder that is trusted.

    Raises:
      StateError: it is none, or asks for anything but what these descriptions consist of.
      OSError: it cannot be read.
    """
    with open(folder / FILE, "rb") as file:
        try:
            found = _Unpickler(file).load()
        except (StateError, OSError):
            raise
        except Exception as error:  # bytes that are no pickle make errors of any kind
            raise broken(folder, f"its {FILE} cannot be read ({error!r})") from error
    try:
        return _described(folder, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise broken(folder, f"its {FILE} is no description ({error!r})") from error


def broken(folder: Path, what: str) -> StateError:
    """The error of a folder that is damaged."""
    return StateError(f"cannot read {folder.name}: {what}.", hint="copy it once more.")


class _Record:
    """Stands for any class of the description: remembers what it was made of."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Record): ...


class _Bytes(_Record): ...


def _nothing(*arguments: Any) -> None:
    """Stands for what is of no interest: layouts, memory formats, paths."""


_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Record,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Record,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _Record,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Record,
    (f"{_CHECKPOINT}.metadata", "StorageMeta"): _Record,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _nothing,
    ("torch", "Size"): tuple,
    **{
        (module, name): _nothing
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_DTYPES:
            return name
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise StateError(
                f"a {FILE} asks for {module}.{name}, which is no part of a description.",
                hint="do not use this checkpoint unless you know who made it.",
            ) from None


_TORCH_DTYPES = frozenset(
    {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}
    | {"float4_e2m1fn_x2", "complex32", *_NAMES}
    | {"quint8", "qint8", "qint32", "quint4x2", "quint2x4"}
)


def _described(folder: Path, found: Any) -> Described:
    metadata = found.state
    if metadata.get("storage_data") is None:
        raise broken(folder, f"its {FILE} does not say where the tensors lie")
    stored = {
        (index.state["fqn"], _numbers(index.state.get("offset") or ())): _stored(folder, info)
        for index, info in metadata["storage_data"].items()
    }
    tensors, others = {}, {}
    for name, entry in metadata["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise TypeError(f"the name {name!r}")
        if isinstance(entry, _Bytes):
            others[name] = stored[name, ()]
            continue
        dtype = entry.state["properties"].state[0]
        if dtype not in _NAMES:
            raise StateError(
                f"cannot read tensor '{name}' of {folder.name}: it has dtype {dtype}.",
                hint="only dense tensors of the usual dtypes are averaged.",
            )
        spec = Spec(dtype, _numbers(entry.state["size"]))
        chunks = []
        for chunk in entry.state["chunks"]:
            offsets, sizes = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
            chunks.append(Chunk(offsets, sizes, stored[name, offsets]))
        _check(folder, name, spec, chunks)
        tensors[name] = spec, chunks
    _check_apart(folder, [c.stored for _, chunks in tensors.values() for c in chunks])
    paths = metadata.get("planner_data")
    if not isinstance(paths, dict):  # a planner that does not flatten
        paths = {}
    return Described(
        tensors, others, {name: tuple(paths.get(name, (name,))) for name in (*tensors, *others)}
    )


def _numbers(value: Any) -> tuple[int, ...]:
    found = tuple(value)
    if len(found) > 64 or not all(type(number) is int and 0 <= number < 2**62 for number in found):
        raise ValueError(f"{found[:8]} are no sizes")
    return found


def _stored(folder: Path, info: Any) -> Stored:
    said = info.state
    name, begin, length = said["relative_path"], said["offset"], said["length"]
    if said.get("transform_descriptors"):
        raise StateError(
            f"cannot read {folder.name}: its tensors are transformed by "
            f"{', '.join(map(str, said['transform_descriptors']))}.",
            hint="save it without extensions.",
        )
    if not isinstance(name, str):
        raise TypeError(f"the file {name!r}")
    _numbers((begin, length))
    path = folder / name
    if not is_contained(folder, name):
        raise StateError(
            f"the {FILE} of {folder.name} names the file {name!r} outside of its folder.",
            hint="do not use this checkpoint unless you know who made it.",
        )
    if not path.is_file():
        raise broken(folder, f"its file {name} is missing")
    if begin + length > path.stat().st_size:
        raise broken(folder, f"its file {name} is too short")
    return Stored(name, begin, length)


def _check(folder: Path, name: str, spec: Spec, chunks: list[Chunk]) -> None:
    """Refuses chunks that do not make up the whole, or claim more than there is."""
    where = f"tensor '{name}'"
    for chunk in chunks:
        if len(chunk.sizes) != len(spec.shape) or len(chunk.offsets) != len(spec.shape):
            raise broken(folder, f"{where} has {len(spec.shape)} dimensions, and its chunks others")
        if math.prod(chunk.sizes) * spec.storage.itemsize > chunk.stored.length:
            raise broken(
                folder,
                f"{where} claims a chunk of shape {chunk.sizes} in {chunk.stored.length} bytes",
            )
    begins = np.array([c.offsets for c in chunks], np.int64).reshape(len(chunks), -1)
    ends = begins + np.array([c.sizes for c in chunks], np.int64).reshape(len(chunks), -1)
    inside = (ends <= np.array(spec.shape, np.int64)).all()
    if not inside or sum(math.prod(c.sizes) for c in chunks) != spec.elements:
        raise broken(folder, f"the chunks of {where} are not all of it")
    for place in range(len(chunks) - 1):
        later = slice(place + 1, None)
        overlap = np.minimum(ends[place], ends[later]) > np.maximum(begins[place], begins[later])
        if overlap.all(axis=1).any():
            raise broken(folder, f"chunks of {where} overlap")


def _check_apart(folder: Path, stored: list[Stored]) -> None:
    """Bytes that are taken for two chunks would unfold to more than there is."""
    ordered = sorted(stored)
    for before, after in itertools.pairwise(ordered):
        if before.file == after.file and before.begin + before.length > after.begin:
            raise broken(folder, f"two chunks lie at the same place of {after.file}")
