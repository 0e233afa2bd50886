"""What may happen to a file, by accident or on purpose."""

from __future__ import annotations

import functools
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]

_NUMBERS = [0, 1, 2, 3, 5, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31]
_NUMBERS += [2**32 - 1, 2**32, 2**40, 10**12, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_TEXTS = ["", "x", "/", "..", "../secret", "/etc/hostname", "a\0b", "\ud800", "é" * 300, "F32"]
BOMB = 150_000_000  # bytes of zeros, which are few when packed


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def flipped(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 20)) if changed else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def flipped_at_the_ends(content: bytes, rng: Rng) -> bytes:
    """Where formats keep what they say of themselves."""
    cut = int(rng.integers(8, 200))
    if rng.random() < 0.5:
        return flipped(content[:cut], rng) + content[cut:]
    return content[:-cut] + flipped(content[-cut:], rng)


def length_changed(content: bytes, rng: Rng) -> bytes:
    """A number in it becomes another: a length, perhaps."""
    size = pick(rng, (1, 2, 4, 8))
    place = int(rng.integers(max(1, len(content) - size)))
    number = pick(rng, _NUMBERS) % (1 << (8 * size))
    order = "little" if rng.random() < 0.8 else "big"
    return content[:place] + number.to_bytes(size, order) + content[place + size :]


def digits_changed(content: bytes, rng: Rng) -> bytes:
    """A number that is written out becomes another."""
    found = [*re.finditer(rb"\d+", content)]
    if not found:
        return flipped(content, rng)
    chosen = pick(rng, found)
    number = str(pick(rng, [*_NUMBERS, -1])).encode()
    return content[: chosen.start()] + number + content[chosen.end() :]


def block_doubled(content: bytes, rng: Rng) -> bytes:
    begin, end = _block(content, rng)
    place = int(rng.integers(len(content) + 1))
    return content[:place] + content[begin:end] + content[place:]


def block_removed(content: bytes, rng: Rng) -> bytes:
    begin, end = _block(content, rng)
    return content[:begin] + content[end:]


def block_filled(content: bytes, rng: Rng) -> bytes:
    begin, end = _block(content, rng)
    filling = rng.bytes(end - begin) if rng.random() < 0.5 else bytes(end - begin)
    return content[:begin] + filling + content[end:]


def blocks_swapped(content: bytes, rng: Rng) -> bytes:
    (a, b), (c, d) = sorted([_block(content, rng), _block(content, rng)])
    b, c = min(b, c), max(b, c)
    d = max(c, d)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _block(content: bytes, rng: Rng) -> tuple[int, int]:
    begin = int(rng.integers(len(content) + 1))
    return begin, min(len(content), begin + int(rng.integers(1, 300)))


def of_another_kind(content: bytes, rng: Rng) -> bytes:
    beginnings = [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x80\x02", b"{}", b"[" * 10**5]
    return pick(rng, beginnings) + (content if rng.random() < 0.3 else b"")


BYTES: list[Mutation] = [
    truncated,
    flipped,
    flipped_at_the_ends,
    length_changed,
    digits_changed,
    block_doubled,
    block_removed,
    block_filled,
    blocks_swapped,
    of_another_kind,
]


def any_bytes(content: bytes, rng: Rng) -> bytes:
    return pick(rng, BYTES)(content, rng)


# What keeps a format's outer form, so that what lies inside is reached.


def value_changed(document: Any, rng: Rng) -> Any:
    """A JSON document with something in it replaced, removed or doubled."""
    if isinstance(document, (dict, list)) and document and rng.random() < 0.85:
        keys = [*document] if isinstance(document, dict) else range(len(document))
        key = pick(rng, [*keys])
        changed = dict(document) if isinstance(document, dict) else list(document)
        chance = rng.random()
        if chance < 0.08:
            del changed[key]
        elif chance < 0.16 and isinstance(changed, dict):
            changed[pick(rng, [*_TEXTS, *keys])] = changed[key]
        else:
            changed[key] = value_changed(changed[key], rng)
        return changed
    if type(document) is int and rng.random() < 0.7:
        return pick(rng, [document + 1, document - 1, -document, *_NUMBERS])
    deep: Any = []
    for _ in range(int(rng.integers(1, 900))):
        deep = [deep]
    others = [None, True, -1, 0.5, 10**400, deep, {}, [], [10**6, 10**6], *_NUMBERS, *_TEXTS]
    return pick(rng, others)


def json_changed(content: bytes, rng: Rng) -> bytes:
    document = json.loads(content)
    for _ in range(int(rng.integers(1, 3))):
        document = value_changed(document, rng)
    return json.dumps(document).encode()


def header_changed(content: bytes, rng: Rng) -> bytes:
    """A safetensors file with another header, whose length is told rightly."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json_changed(content[8 : 8 + length], rng)
    if rng.random() < 0.2:  # one that is not unique, or not of this world
        header = pick(rng, (header[:-1] + b"," + header[1:], b"[" * 10**5, b'{"a":' * 10**4))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def member_changed(content: bytes, rng: Rng) -> bytes:
    """A zip file with another member, whose checksum is told rightly."""
    source = zipfile.ZipFile(io.BytesIO(content))
    chosen = pick(rng, source.infolist()).filename
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as target:
        for info in source.infolist():
            held = source.read(info)
            packing = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else info.compress_type
            if info.filename != chosen:
                target.writestr(info.filename, held, packing)
                continue
            chance = rng.random()
            if chance < 0.06:
                continue
            name = info.filename if chance > 0.12 else f"../{info.filename}"
            if chance < 0.9:
                held = any_bytes(held, rng)
            target.writestr(name, held, packing)
    return result.getvalue()


@functools.cache
def packed_zeros(name: str, head: bytes) -> bytes:
    result = io.BytesIO()
    with (
        zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as target,
        target.open(name, "w", force_zip64=True) as member,
    ):
        member.write(head)
        for _ in range(BOMB // 10**6):
            member.write(bytes(10**6))
    return result.getvalue()
