"""Weights as people have them: in files, too."""

from __future__ import annotations

import os
from typing import Any

from swa_core import safetensors_files
from swa_core.average_files import AverageFile, load_average
from swa_core.errors import NothingAveragedError


def read(path: str | os.PathLike[str]) -> AverageFile | dict[str, Any]:
    """A safetensors file: an average that was saved, or else its arrays by name.

    Raises:
      StateError: no safetensors file, truncated or damaged.
      OSError: it cannot be read.

    >>> import tempfile
    >>> import numpy as np
    >>> from swa_core import SWAConfig, SWAState, save_average
    >>> file = tempfile.mkdtemp() + "/average.safetensors"
    >>> save_average(file, SWAState(7, 2, 0, 2.0, {"w": np.zeros(1)}), SWAConfig())
    >>> averages_of(read(file))
    {'w': array([0.])}
    """
    arrays, metadata = safetensors_files.read(path)
    return load_average(path) if "swa" in metadata else arrays


def averages_of(file: AverageFile) -> dict[str, Any]:
    """The averages of a file that was loaded.

    Raises:
      NothingAveragedError: it was saved before the first snapshot.
    """
    if not file.state.n_averaged:
        raise NothingAveragedError("the file was saved before the first snapshot.")
    return dict(file.state.average)
