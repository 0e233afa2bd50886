"""The state of torch's generators, which shuffle and draw the dropout of layers without a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch


def save() -> dict[str, npt.NDArray[Any]]:
    """On the host and, where it is in use, on the accelerator."""
    arrays = {"torch": torch.get_rng_state().numpy()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        arrays["torch/cuda"] = torch.cuda.get_rng_state().numpy()
    return arrays


def load(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Goes on from there, as far as it was saved."""
    if "torch" in arrays:
        torch.set_rng_state(torch.from_numpy(arrays["torch"]))
    if "torch/cuda" in arrays and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(arrays["torch/cuda"]))
