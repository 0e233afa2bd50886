"""A look at the heaps of an HDF5 file before its library looks: of one that is damaged, it reads
an entry of no size again and again, and never returns.

Source:
  https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (global heap).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_HEAP = b"GCOL\x01\0\0\0"  # its signature, version and what is reserved
_HEAD = 16  # bytes, of a heap and of an entry
_SUPERBLOCK = b"\x89HDF\r\n\x1a\n"


def check(path: Path) -> None:
    """Makes sure that every heap of variable-length values (strings) can be read to its end.

    Raises:
      ValueError: one cannot.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_SUPERBLOCK)
        version = content[start + 8]
        if content[start + (14 if version < 2 else 10)] != 8:
            raise ValueError("its lengths are not written in 8 bytes")
        place = content.find(_HEAP)
        while place >= 0:
            _check_heap(content, place)
            place = content.find(_HEAP, place + 1)


def _check_heap(content: mmap.mmap, place: int) -> None:
    (size,) = struct.unpack("<Q", content[place + 8 : place + 16].ljust(8, b"\0"))
    if not _HEAD <= size <= len(content) - place:
        raise ValueError("a heap of it is truncated")
    inside = _HEAD
    while inside + _HEAD <= size:
        begin = place + inside
        number, length = struct.unpack("<H6xQ", content[begin : begin + _HEAD])
        # Number 0 is what is free, and counts its own head.
        step = _HEAD + (length + 7) // 8 * 8 if number else length
        if step < _HEAD or inside + step > size:
            raise ValueError("a heap of it is damaged")
        inside += step
