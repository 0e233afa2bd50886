"""Finding out what kind of checkpoint lies at a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from swa_core.checkpoints import npz_format, safetensors_format
from swa_core.checkpoints.parts import EVERYTHING
from swa_core.checkpoints.tensors import Checkpoint
from swa_core.errors import StateError

ENTRY_POINTS = "swa_core.checkpoints"
_FOLDER = "folder/"
_OWN: tuple[Callable[[Path], Checkpoint | None], ...] = (
    safetensors_format.sniff,
    npz_format.sniff,
)


def open_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, trust: bool = False
) -> Checkpoint:
    """Opens a checkpoint of any kind that is known here, to be closed. No tensor is read yet.

    Known are safetensors (a file, or the folder or index of a sharded one), npz, and what
    installed packages declare under the entry point "swa_core.checkpoints": functions that take a
    path, a key and whether it is trusted, and give a ``Checkpoint``, or None if it is none of
    theirs. They are named by the suffix of a file (".pt"), or by what lies in a folder
    ("folder/.metadata", a pattern), so that no framework is imported for the files of another.

    Args:
      path: of a file or folder.
      key: the part of the checkpoint that is meant, where it may have several ("model"); "*" is
        all of it.
      trust: also read what had to be unpickled; of a torch.distributed.checkpoint folder its
        description, which is a pickle.

    Raises:
      StateError: of no known kind, or damaged; or its reader is not installed.
      OSError: it is not there or cannot be read.

    >>> import tempfile, numpy
    >>> file = Path(tempfile.mkdtemp(), "checkpoint.npz")
    >>> numpy.savez(file, w=numpy.zeros((2, 3)))
    >>> from contextlib import closing
    >>> with closing(open_checkpoint(file)) as checkpoint:
    ...     dict(checkpoint.tensors)
    {'w': Spec(dtype='float64', shape=(2, 3))}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    for sniff in _OWN:
        if (found := sniff(path)) is not None:
            if key not in (None, EVERYTHING):
                found.close()
                raise StateError(f"{path.name} has no parts such as '{key}'.", hint="say no key.")
            return found
    for point in entry_points(group=ENTRY_POINTS):
        if _is_named(path, point.name):
            found = cast("Checkpoint | None", _loaded(point, path)(path, key, trust))
            if found is not None:
                return found
    raise StateError(
        f"{path.name} is no checkpoint of a kind that is known here.",
        hint="known are *.safetensors, folders with *.safetensors.index.json, *.npz; with the "
        "extra torch *.pt, *.pth, *.bin, *.ckpt and folders of torch.distributed.checkpoint; with "
        "keras *.weights.h5 and *.keras; with orbax its folders.",
    )


def is_known(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder, or has the name of a kind that is not one file of safetensors."""
    path = Path(path)
    return (
        path.is_dir()
        or path.name.endswith((".npz", safetensors_format.INDEX))
        or any(_is_named(path, point.name) for point in entry_points(group=ENTRY_POINTS))
    )


def _is_named(path: Path, name: str) -> bool:
    """Whether an entry point's name is that of a checkpoint's kind."""
    if not path.is_dir():
        return name == path.suffix
    return name.startswith(_FOLDER) and next(path.glob(name[len(_FOLDER) :]), None) is not None


def _loaded(point: EntryPoint, path: Path) -> Any:
    try:
        return point.load()
    except ImportError as error:
        extras = ",".join(point.extras)
        raise StateError(
            f"cannot read {path.name}: {error}.",
            hint=f'pip install "swa-core[{extras}]"' if extras else "install what it needs.",
        ) from error
