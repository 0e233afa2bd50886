"""One tensor as torch.save writes it, inside of a larger file: where its numbers lie, and the
writing of one piece by piece.

Nothing of it is unpickled by torch, and nothing is executed: its description is made of a handful
of names, for which there are stand-ins here.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import torch

from swa_core.checkpoints import Spec
from swa_core.checkpoints.tensors import Array
from swa_torch.checkpoints import DTYPES

_MAX_DESCRIPTION = 1 << 16  # bytes; it is a few hundred
_STORAGES = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "bool": "BoolStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}


_DTYPES_OF = {storage: dtype for dtype, storage in _STORAGES.items()}


class Laid(NamedTuple):
    """How the numbers of a tensor lie in a file.

    Attributes:
      begin: the byte of the first.
      strides: in elements; None where they lie in order.
      span: how many elements there are from the first to the last.
    """

    begin: int
    strides: tuple[int, ...] | None
    span: int


def laid(file: IO[bytes], begin: int, length: int, spec: Spec) -> Laid:
    """Finds the numbers of a tensor that torch.save wrote into a part of a file.

    Args:
      file: open; of it the bytes from ``begin`` on, ``length`` of them, are the tensor.
      begin: of the part.
      length: of the part [bytes].
      spec: what the tensor should be.

    Raises:
      ValueError: it is something else, or claims more than there is.
      Exception: what zipfile and pickle make of bytes that are none of theirs.
    """
    with zipfile.ZipFile(_Part(file, begin, length)) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        description = members["data.pkl"]
        if description.file_size > _MAX_DESCRIPTION:
            raise ValueError(f"its description takes {description.file_size} bytes")
        if "byteorder" in members:
            order = archive.read(members["byteorder"]).decode()
            if order != sys.byteorder:
                raise ValueError(f"its byte order is {order}")
        tensor = _Unpickler(io.BytesIO(archive.read(description))).load()
        if not isinstance(tensor, _Tensor):
            raise ValueError("it is no tensor")
        data = members[f"data/{tensor.storage.key}"]
    if (tensor.storage.dtype, tuple(tensor.size)) != (spec.dtype, spec.shape):
        raise ValueError(f"it is {tensor.storage.dtype} of shape {tuple(tensor.size)}")
    strides = tuple(tensor.stride)
    last = sum((size - 1) * stride for size, stride in zip(spec.shape, strides, strict=True))
    span = last + 1 if spec.elements else 0
    held = data.file_size // spec.storage.itemsize
    if min((tensor.offset, *strides)) < 0 or tensor.offset + span > held or span < spec.elements:
        raise ValueError(f"it claims {spec.elements} numbers, and {held} are there")
    if data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    # The names and extras before the data may be longer than those of the directory at the end.
    head = os.pread(file.fileno(), 30, begin + data.header_offset)
    named, extra = struct.unpack("<HH", head[26:])
    place = data.header_offset + 30 + named + extra
    place += tensor.offset * spec.storage.itemsize
    if place + span * spec.storage.itemsize > length:
        raise ValueError("its data end after it does")
    ordered = all(
        size == 1 or stride == math.prod(spec.shape[dim + 1 :])
        for dim, (size, stride) in enumerate(zip(spec.shape, strides, strict=True))
    )
    is_ordered = ordered or not spec.elements
    return Laid(begin + place, None if is_ordered else strides, span)


def write(file: IO[bytes], spec: Spec, numbers: Iterable[Array]) -> int:
    """Writes a tensor at the end of a file as torch.save does, with its numbers as they come.

    Returns:
      How many bytes it takes.
    """
    begin = file.tell()
    description = io.BytesIO()
    _Pickler(description, protocol=2).dump(_Saved(spec))
    with zipfile.ZipFile(_From(file, begin), "w") as archive:
        archive.writestr("archive/data.pkl", description.getvalue())
        archive.writestr("archive/byteorder", sys.byteorder)
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for array in numbers:
                member.write(array.data)
        archive.writestr("archive/version", "3\n")
    return file.seek(0, os.SEEK_END) - begin


class _Part(io.RawIOBase):
    """Some of a file, to be read as if it were all of it."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        self._descriptor, self._begin, self._length, self._place = file.fileno(), begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._place))
        content = os.pread(self._descriptor, size, self._begin + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class _From:
    """A file that is written from a place on, as if it began there."""

    def __init__(self, file: IO[bytes], begin: int) -> None:
        self._file, self._begin = file, begin

    def write(self, content: Any) -> int:
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = self._begin if whence == os.SEEK_SET else 0
        return self._file.seek(base + offset, whence) - self._begin

    def flush(self) -> None:
        self._file.flush()


class _Storage(NamedTuple):
    dtype: str | None  # an untyped one has none of its own
    key: str


class _Tensor:
    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> None:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
            raise ValueError("it is no plain tensor")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def _typed(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
    """Of dtypes that have no class of storage of their own (uint16)."""
    return _Tensor(storage._replace(dtype=more[2]), offset, size, stride)


def _inner(tensor: Any, *more: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name.endswith("Storage") or name in DTYPES.values()):
            return name
        if module == "torch.storage" and name == "UntypedStorage":
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _typed,
            ("torch._utils", "_rebuild_parameter"): _inner,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in known:
            raise ValueError(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, said: Any) -> _Storage:
        kind, storage, key, *_ = said
        if kind != "storage" or not isinstance(storage, str) or not isinstance(key, str):
            raise ValueError("it is no storage")
        return _Storage(_DTYPES_OF.get(storage), key)


class _Saved:
    """A tensor for the pickler: what torch.load makes one of."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.spec.shape
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        common = (_Numbers(self.spec), 0, shape, strides, False, collections.OrderedDict())
        if self.spec.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, common
        dtype = getattr(torch, self.spec.dtype)
        return torch._utils._rebuild_tensor_v3, (*common, dtype)


class _Numbers:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Numbers):
            return None
        spec = value.spec
        kind = getattr(torch, _STORAGES[spec.dtype]) if spec.dtype in _STORAGES else None
        size = spec.elements if kind is not None else spec.bytes
        return "storage", kind or torch.UntypedStorage, "0", "cpu", size
