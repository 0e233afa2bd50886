"""Finding out what kind of checkpoint lies at a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from swa_core.checkpoints import npz_format, safetensors_format
from swa_core.checkpoints.tensors import Checkpoint
from swa_core.errors import StateError

ENTRY_POINTS = "swa_core.checkpoints"
_OWN: tuple[Callable[[Path], Checkpoint | None], ...] = (
    safetensors_format.sniff,
    npz_format.sniff,
)


def open_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Opens a checkpoint of any kind that is known here, to be closed. No tensor is read yet.

    Known are safetensors (a file, or the folder or index of a sharded one), npz, and what
    installed packages declare under the entry point "swa_core.checkpoints", by suffix or "folder"
    (swa_torch the files of torch.save, swa_keras its own): functions that take a path and a key and
    give a ``Checkpoint``, or None if it is none of theirs.

    Args:
      path: of a file or folder.
      key: the part of the checkpoint that is meant, where it may have several ("model").

    Raises:
      StateError: of no known kind, or damaged.
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
            if key is not None:
                found.close()
                raise StateError(f"{path.name} has no parts such as '{key}'.", hint="say no key.")
            return found
    # Named by suffix, so that no framework is imported for the files of another.
    kind = "folder" if path.is_dir() else path.suffix
    for point in entry_points(group=ENTRY_POINTS, name=kind):
        if (found := cast("Checkpoint | None", point.load()(path, key))) is not None:
            return found
    raise StateError(
        f"{path.name} is no checkpoint of a kind that is known here.",
        hint="known are *.safetensors, folders with *.safetensors.index.json, *.npz; with the "
        "extra torch *.pt, *.pth, *.bin and *.ckpt; with keras *.weights.h5 and *.keras.",
    )
