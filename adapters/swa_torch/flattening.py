"""What torch.distributed.checkpoint finds when it takes a flat state dict apart.

With ``flatten_optimizer_state_dict=True`` it asks the optimizer's groups and state which keys to
look for, and ours are in neither. So while it asks, and only if they were saved, they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor

_MODULE = "torch.distributed.checkpoint.state_dict"
_ASKING = "_unflatten_optim_state_dict"


def groups_to_find(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups as they are to be found by who reads a property that calls this.

    >>> groups_to_find([{"params": [], "lr": 0.1}])
    [{'params': [], 'lr': 0.1}]
    """
    asking = _asking()
    if asking is None:
        return groups
    saved = asking.f_locals.get("state_dict", {})
    if not any(key.startswith("param_groups.") and key.endswith(".swa") for key in saved):
        return groups
    first = next(group for group in groups if group["params"])
    return [{**group, "swa": ""} if group is first else group for group in groups]


def state_to_find(state: Any) -> Any:
    """The optimizer's state, likewise."""
    asking = _asking()
    return state if asking is None else _Names(state, asking)


class _Names:
    """By parameter, the names of what its state has."""

    def __init__(self, state: Mapping[Tensor, Mapping[str, Any]], asking: FrameType) -> None:
        self._state = state
        self._asking = asking

    def __getitem__(self, parameter: Tensor) -> list[str]:
        names = [*self._state.get(parameter, {})]
        name, saved = (self._asking.f_locals.get(key) for key in ("fqn", "state_dict"))
        if saved and f"state.{name}.swa_average" in saved:
            names.append("swa_average")
        return names


def _asking() -> FrameType | None:
    if _MODULE not in sys.modules:
        return None
    frame = sys._getframe(3)  # past the function here and the property
    is_it = frame.f_code.co_name == _ASKING and frame.f_globals.get("__name__") == _MODULE
    return frame if is_it else None
