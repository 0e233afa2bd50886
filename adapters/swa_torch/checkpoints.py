"""Checkpoints of torch.save, for ``swa average``: found by entry point, executed never."""

from __future__ import annotations

import collections
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swa_core import memory_budget
from swa_core.atomic import replacing
from swa_core.checkpoints import EVERYTHING, Spec
from swa_core.checkpoints.tensors import Array, Piece, Write
from swa_core.errors import StateError

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_STORED = {torch.bfloat16: torch.int16}  # numpy has no such dtype, so its bits are handed over
DTYPES = {
    torch.bfloat16: "bfloat16",
    **{
        getattr(torch, name): name
        for name in (
            *("float16", "float32", "float64", "complex64", "complex128", "bool"),
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        )
    },
}


def open_checkpoint(
    path: Path, key: str | None = None, trust: bool = False
) -> StateDictFile | None:
    """The state dict in a file of torch.save, or None if the file is none by its name.

    Args:
      path: of the file.
      key: where the state dict stands in a checkpoint that holds more, such as "model" or
        "state_dict"; dots lead deeper.
      trust: changes nothing; what could run code is never read.

    Raises:
      StateError: damaged; needs more than ``weights_only=True`` to load; or holds no state dict
        there.
    """
    if path.suffix not in _SUFFIXES or not path.is_file():
        return None
    return StateDictFile(path, None if key == EVERYTHING else key)


class StateDictFile:
    """Tensors by name, mapped into memory as long as the file allows it."""

    is_random = True

    def __init__(self, path: Path, key: str | None) -> None:
        self.path = path
        self.files = [path]
        found = _part(path, _loaded(path), key)
        self._names: dict[str, str] = {}  # of every tensor, the name of the one it is tied to
        self._held: dict[str, Tensor] = {}
        first: dict[Any, str] = {}
        for name, tensor in found.items():
            _check(path, name, tensor)
            # Each of two empty tensors stands for itself.
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            kept = first.setdefault(place, name) if tensor.numel() else name
            self._names[name] = kept
            if kept == name:
                self._held[name] = tensor.detach()
        self.tensors: Mapping[str, Spec] = {
            name: Spec(DTYPES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self._held.items()
        }

    @property
    def memory_to_write(self) -> int:
        """All of the result, which torch.save takes at once."""
        return sum(spec.bytes for spec in self.tensors.values())

    def read(self, piece: Piece) -> Array:
        tensor = self._held[piece.name]
        if not tensor.is_contiguous():  # not anew for each piece
            tensor = self._held[piece.name] = tensor.contiguous()
        flat = tensor.view(-1)[piece.begin : piece.end]
        array: Array = flat.view(_STORED.get(tensor.dtype, tensor.dtype)).numpy()
        # A copy: what is mapped must not be added to.
        return array.astype(self.tensors[piece.name].storage, copy=True)

    def stretch(self, name: str) -> int:
        return 1

    @contextmanager
    def writing(self, path: Path) -> Iterator[Write]:
        """A state dict of the same names, tied where this one is."""
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in self._held.items()}
        flat = {name: tensor.view(-1) for name, tensor in tensors.items()}

        def write(pieces: Iterator[tuple[Piece, Array]]) -> None:
            for piece, array in pieces:
                target = flat[piece.name][piece.begin : piece.end]
                stored = torch.from_numpy(array.view(_numpy_of(target)))
                target.view(_STORED.get(target.dtype, target.dtype)).copy_(stored)

        yield write
        whole = collections.OrderedDict((n, tensors[kept]) for n, kept in self._names.items())
        with replacing(path) as file:
            torch.save(whole, file)

    def close(self) -> None:
        self._held = {}


def _loaded(path: Path) -> Any:
    try:
        # Old files cannot be mapped, and are read whole.
        is_zip = zipfile.is_zipfile(path)
        if not is_zip:
            memory_budget.claim(path.stat().st_size, f"{path.name}, which is read whole,")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, StateError):
        raise
    except Exception as error:  # pickle, zip and torch each have errors of their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StateError(
            f"cannot read {path.name}: {first}",
            hint="only what torch.load(weights_only=True) takes is read, since anything else could "
            "run code; save model.state_dict() alone.",
        ) from error


def _part(path: Path, content: Any, key: str | None) -> Mapping[str, Tensor]:
    for step in key.split(".") if key else ():
        if not isinstance(content, Mapping) or step not in content:
            raise StateError(
                f"{path.name} has no part '{key}'.", hint=f"it holds {_described(content)}."
            )
        content = content[step]
    is_state_dict = isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not is_state_dict or not content:
        where = f"part '{key}' of {path.name}" if key else path.name
        raise StateError(
            f"{where} is no state dict of tensors alone.",
            hint=f"name the part that is one (--key model, or key=...); it holds "
            f"{_described(content)}.",
        )
    found: Mapping[str, Tensor] = content
    return found


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [f"'{name}' ({type(value).__name__})" for name, value in content.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "") or "nothing"


def _check(path: Path, name: str, tensor: Tensor) -> None:
    """Refuses what cannot be read as numbers, or claims more than there is."""
    where = f"tensor '{name}' of {path.name}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPES:
        raise StateError(
            f"cannot read {where}: it is {tensor.layout}, {tensor.dtype}.",
            hint="only dense tensors of the usual dtypes are averaged.",
        )
    if tensor.is_meta:
        raise StateError(f"cannot read {where}: it has no values.", hint="save it again.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise StateError(
            f"cannot read {where}: it claims {tensor.numel()} numbers, and "
            f"{tensor.untyped_storage().nbytes()} bytes are there.",
            hint="it was expanded, or somebody made it to fill your memory; save it again after "
            "contiguous().",
        )


def _numpy_of(tensor: Tensor) -> np.dtype[Any]:
    return np.dtype(DTYPES[_STORED.get(tensor.dtype, tensor.dtype)])
