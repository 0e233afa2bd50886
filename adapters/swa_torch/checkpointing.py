"""What torch.distributed.checkpoint does with an optimizer, and how to know that it is at it.

It keeps nothing of a state dict but ``state`` and ``param_groups``, so it is handed another one
than everybody else. And to get an optimizer's state into shape before it is saved or loaded, it
makes one step with a rate of 0 and gradients of 0 while the state is empty - at every call, if the
optimizer never has state. That is no update. The zeros do not tell it from one: a warm-up may begin
with a rate of 0, and with gradients of 0 too. So it is known by who calls.
"""

from __future__ import annotations

import enum
import sys
from types import FrameType
from typing import Any

from torch import Tensor

MODULE = "torch.distributed.checkpoint.state_dict"
_LOADING = ("set_optimizer_state_dict", "set_state_dict")


class Caller(enum.Enum):
    """Who waits for what is done now."""

    OTHER = enum.auto()
    SAVING = enum.auto()  # get_optimizer_state_dict
    FLATTENING = enum.auto()  # the same with flatten_optimizer_state_dict=True
    LOADING = enum.auto()  # set_optimizer_state_dict, which merges a state into the one it gets


def caller() -> Caller:
    """Whether torch.distributed.checkpoint's state-dict functions wait for what is done now.

    >>> caller()
    <Caller.OTHER: 1>
    """
    found = Caller.OTHER
    if MODULE not in sys.modules:
        return found
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == MODULE:
            if frame.f_code.co_name in _LOADING:
                return Caller.LOADING
            options = frame.f_locals.get("info")
            if getattr(options, "flatten_optimizer_state_dict", False):
                found = Caller.FLATTENING
            elif found is Caller.OTHER:
                found = Caller.SAVING
        frame = frame.f_back
    return found


def may_be_phantom(groups: list[dict[str, Any]]) -> bool:
    """Whether it is worth the time to ask who makes a step: torch has imported that, the rate is 0.

    Args:
      groups: of the optimizer.
    """
    if MODULE not in sys.modules:
        return False
    rate = groups[0].get("lr", 0.0)
    # One in a tensor is not asked: an accelerator would have to be waited for.
    return isinstance(rate, Tensor) or rate == 0.0
