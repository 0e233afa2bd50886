"""The learning rate of ``[swa.lr]``, set on an optimizer's groups."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from swa_core.errors import SWAWarning
from swa_core.learning_rate import LRSchedule, learning_rate

# A warning names the line of the training loop: between it and here are torch and this package.
_PASSED = ("swa_torch", "torch")


class Rates:
    """Sets each group's rate before an update, from the rate that the group had at the start.

    Attributes:
      base: the rate of each group at the start, None before it is known.
    """

    def __init__(self, schedule: LRSchedule) -> None:
        self.schedule = schedule
        self.base: list[float | None] = []
        self._left: list[float | None] = []
        self._has_said = False

    def load(self, base: list[float | None]) -> None:
        """Goes on from saved base rates; what the groups hold is then nobody's interference."""
        self.base = list(base)
        self._left = []

    def before_update(self, update: int, groups: list[dict[str, Any]]) -> None:
        """Prepares the groups for the update to be made (the first is 1)."""
        if update < self.schedule.start:
            return
        for known in (self.base, self._left):
            known.extend([None] * (len(groups) - len(known)))
        for place, group in enumerate(groups):
            base, left = self.base[place], self._left[place]
            if base is None:
                base = self.base[place] = float(group["lr"])
            rate = float(learning_rate(update, base, self.schedule))
            # Whoever sets what we set (another SWA of this configuration, say) does not interfere.
            if left is not None and not (_holds(group["lr"], left) or _holds(group["lr"], rate)):
                self._say()
            if isinstance(group["lr"], torch.Tensor):
                # In place: a captured graph reads this very tensor.
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            self._left[place] = rate

    def _say(self) -> None:
        if not self._has_said:
            self._has_said = True
            warnings.warn(
                "something else sets the learning rate too (a scheduler?). From update "
                f"{self.schedule.start} on [swa.lr] decides; leave it out to keep the other one.",
                SWAWarning,
                stacklevel=_users_level(),
            )


def _users_level() -> int:
    """The stack level, for a warning of the caller, of the line that made the update."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        frame, level = frame.f_back, level + 1
    return level


def _holds(lr: Any, rate: float) -> bool:
    """Whether a group's rate is still the one that was set."""
    if isinstance(lr, torch.Tensor):
        # Asking an accelerator would make the host wait for it.
        return lr.device.type != "cpu" or bool(lr == torch.tensor(rate, dtype=lr.dtype))
    return bool(lr == rate)
