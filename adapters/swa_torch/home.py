"""Where averages live, and how wide they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WIDTHS = {"float32": torch.float32, "float64": torch.float64}


class Home(NamedTuple):
    """What a user has said of the memory of the averages.

    Attributes:
      device: where all averages are kept; None for each beside its parameter.
      dtype: what averages are kept in at least. Those of wider weights are as wide as these.
    """

    device: torch.device | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Home:
        """From what the user wrote.

        Raises:
          ValueError: another device than the CPU, or a dtype that is none for averages.

        >>> Home.of("cpu", "float64")
        Home(device=device(type='cpu'), dtype=torch.float64)
        """
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(
                f"device={str(device)!r}: averages are kept beside the weights (device=None) or "
                'on the host (device="cpu").'
            )
        name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        if name not in _WIDTHS:
            raise ValueError(
                f"dtype={name!r}: averages are kept in float32 or float64, or in the weights' own "
                "dtype if that is wider. Narrower ones lose what a snapshot adds."
            )
        return cls(None if device is None else torch.device("cpu"), _WIDTHS[name])

    def device_of(self, weight: Tensor) -> torch.device:
        """Where the average of such weights lives."""
        return weight.device if self.device is None else self.device

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that an average of weights of this dtype is kept in.

        >>> Home().dtype_of(torch.bfloat16), Home().dtype_of(torch.float64)
        (torch.float32, torch.float64)
        >>> Home(dtype=torch.float64).dtype_of(torch.complex64)
        torch.complex128
        """
        least = self.dtype.to_complex() if dtype.is_complex else self.dtype
        # Of the narrow dtypes not all can be promoted, but all are narrower.
        return least if dtype.itemsize < least.itemsize else torch.promote_types(dtype, least)

    def takes(self, saved: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether a saved average can go on here, as the one of weights of this dtype.

        One that was kept in the weights' own width is widened; nothing is narrowed.

        >>> Home(dtype=torch.float64).takes(torch.float32, torch.bfloat16)
        True
        >>> Home().takes(torch.float64, torch.float32), Home().takes(torch.int32, torch.float32)
        (False, False)
        """
        if not (saved.is_floating_point or saved.is_complex):
            return False
        plain = Home()
        return plain.dtype_of(saved) in (plain.dtype_of(dtype), self.dtype_of(dtype))

    def zeros(self, weight: Tensor) -> Tensor:
        """The average of such weights before the first snapshot, in the same layout."""
        with torch.inference_mode(False):  # it outlives the block
            return torch.zeros_like(
                weight,
                dtype=self.dtype_of(weight.dtype),
                device=self.device_of(weight),
                requires_grad=False,
            ).detach()
