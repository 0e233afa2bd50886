"""The safetensors format: named arrays and a few strings in one file, which executes nothing.

The core needs numpy only, so it reads and writes the format itself. What a file claims is checked
against its size before anything is allocated.

Source:
  https://huggingface.co/docs/safetensors (the format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swa_core import memory_budget
from swa_core.atomic import replacing
from swa_core.errors import StateError

Arrays = dict[str, npt.NDArray[Any]]

_MAX_HEADER = 100_000_000  # bytes; what the format's own readers accept
_PARSED = 27  # bytes that a byte of the header takes at the most, while it is read
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where an array lies in the data of a file.

    Attributes:
      dtype: what numpy reads there; of bfloat16 the bits, as uint16.
      shape: its dimensions.
      begin: its first byte, counted from the end of the header.
      end: the byte after its last.
      is_bfloat16: numpy has no such dtype, so ``read`` widens it to float32.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int
    is_bfloat16: bool = False


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays and strings, whole or not at all.

    Args:
      path: the file, replaced if it is there.
      arrays: by name; of any layout in memory.
      metadata: strings by name.

    Raises:
      StateError: an array of a dtype that the format does not have.
      OSError: the file cannot be written.
    """
    prepared = {name: _prepared(name, array) for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Larger elements first, so that every array begins at a multiple of its element's size.
    ordered = sorted(prepared, key=lambda name: (-prepared[name][0].itemsize, name))
    place = 0
    for name in ordered:
        array, dtype = prepared[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    with replacing(path) as file:
        file.write(packed(header))
        for name in ordered:
            if prepared[name][0].nbytes:
                file.write(np.ascontiguousarray(prepared[name][0]).reshape(-1).view(np.uint8).data)


def packed(header: Mapping[str, Any]) -> bytes:
    """The beginning of a file: the length of the header, and the header."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def kind_of(entry: Entry) -> str:
    """What the format calls the dtype of an entry.

    >>> kind_of(Entry(np.dtype("uint16"), (1,), 0, 2, is_bfloat16=True))
    'BF16'
    """
    return "BF16" if entry.is_bfloat16 else _NAMES[entry.dtype]


def read(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """The arrays and strings of a file; bfloat16 as float32, of which it is a part.

    Raises:
      StateError: no safetensors file, truncated or damaged, naming the array; nothing is
        allocated for what a damaged header claims.
      OSError: the file cannot be read.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "example.safetensors")
    >>> write(file, {"w": np.float32([1, 2])}, {"by": "hand"})
    >>> read(file)
    ({'w': array([1., 2.], dtype=float32)}, {'by': 'hand'})
    """
    with open(path, "rb") as file:
        entries, metadata, start = read_header(file, os.path.basename(path))
        return {name: _array(file, start, entry) for name, entry in entries.items()}, metadata


def read_header(file: IO[bytes], name: str) -> tuple[dict[str, Entry], dict[str, str], int]:
    """What a file holds: its arrays' entries, its strings, and where the data begin.

    Args:
      file: open, at its beginning.
      name: of the file, for messages.

    Raises:
      StateError: no safetensors file, truncated or damaged.
    """
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise _broken(name, "it is no safetensors file, or its beginning is damaged")
    memory_budget.check(_PARSED * length, f"the header of {name}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(name, f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _broken(name, "its header is no table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(name, "its metadata are not strings")
    entries = {key: _entry(name, key, value) for key, value in header.items()}
    place = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise _broken(name, f"array '{key}' begins at byte {entry.begin}, and not at {place}")
        place = entry.end
    if 8 + length + place != size:
        raise _broken(
            name, f"its arrays take {place} bytes, and {max(size - 8 - length, 0)} are there"
        )
    return entries, metadata, 8 + length


def _entry(file: str, key: str, value: Any) -> Entry:
    where = f"array '{key}'"
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(file, f"{where} is not described by dtype, shape and place") from error
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _broken(file, f"{where} has shape {shape!r} at {begin!r} to {end!r}")
    if len(shape) > 64:  # as many dimensions as numpy has
        raise _broken(file, f"{where} has {len(shape)} dimensions")
    dtype = np.dtype("<u2") if kind == "BF16" else _DTYPES.get(str(kind))
    if dtype is None:
        raise StateError(
            f"cannot read {file}: {where} has dtype {kind!r}, which numpy does not have.",
            hint="read it with the safetensors package and the framework that wrote it.",
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _broken(
            file, f"{where} of shape {shape} and dtype {kind} cannot take {end - begin} bytes"
        )
    return Entry(dtype, tuple(shape), begin, end, kind == "BF16")


def _array(file: IO[bytes], start: int, entry: Entry) -> npt.NDArray[Any]:
    file.seek(start + entry.begin)
    array = np.empty(entry.shape, entry.dtype)
    into = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    if file.readinto(into) != array.nbytes:  # type: ignore[attr-defined]
        raise _broken(os.path.basename(file.name), "it became shorter while it was read")
    if entry.is_bfloat16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    native: npt.NDArray[Any] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return native


def _prepared(name: str, array: Any) -> tuple[npt.NDArray[Any], str]:
    found = np.asarray(array)
    if found.dtype.name == "bfloat16":
        return found.view(np.uint16), "BF16"
    dtype = found.dtype.newbyteorder("<")
    kind = _NAMES.get(dtype)
    if kind is None:
        raise StateError(
            f"cannot write array '{name}': the safetensors format has no dtype {found.dtype}.",
            hint="convert it first.",
        )
    return found.astype(dtype, copy=False), kind


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _broken(file: str, what: str) -> StateError:
    return StateError(
        f"cannot read {file}: {what}.", hint="load an earlier file, or copy it once more."
    )
