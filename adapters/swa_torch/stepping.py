"""Who makes an update, and when it is done: each is told of once."""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Function = TypeVar("Function", bound=Callable[..., Any])


def not_traced(function: Function) -> Function:
    """Has torch.compile call a function and not look into it; a call costs nothing more.

    What is counted in Python would be compiled anew at each update otherwise.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """The same, for a function and all that it calls: half a microsecond more at each call.

    Not to be used where a function is defined: it imports the compiler, which takes seconds, and
    which whoever has made an optimizer has done already.

    >>> untraced(divmod)(7, 2)
    (3, 1)
    """
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]


class Watch:
    """Tells of each update of an optimizer once, whoever makes it.

    The optimizer's own hooks do, but for three kinds. One that leaves out ``Optimizer.__init__``
    (wrappers of optimizers do) has none: they are put in. One whose ``step`` calls the ``step`` of
    its base class calls its hooks in both: the outer one counts. And a fused one that a
    ``GradScaler`` steps is stepped also when its kernel is to do nothing, for a gradient overflow.

    Args:
      optimizer: whose updates.
      before: the hook before an update, a method: ``before(optimizer, args, kwargs)``.
      after: the hook after an update, a method of the same object.
    """

    def __init__(
        self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        self._before, self._after = before, after
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = optimizer.__dict__.setdefault(name, OrderedDict())
            # Some optimizers, copied or unpickled, keep their hooks; torch's own drop them.
            for key in [key for key, hook in hooks.items() if _owner(hook) is _owner(before)]:
                del hooks[key]
        optimizer._patch_step_function()
        if _may_nest(optimizer):
            before, after = self._before_outermost, self._after_outermost
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            after = self._after_scaled
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def remove(self) -> None:
        """Tells of no more updates."""
        for handle in self._handles:
            handle.remove()

    @not_traced
    def _before_outermost(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_outermost(optimizer):
            self._before(optimizer, args, kwargs)

    @not_traced
    def _after_outermost(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_outermost(optimizer):
            self._after_scaled(optimizer, args, kwargs)

    @not_traced
    def _after_scaled(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # What GradScaler leaves here for the kernel, while it makes this step.
        if not optimizer.__dict__.get("found_inf"):
            self._after(optimizer, args, kwargs)


def watchers(optimizer: Optimizer) -> list[object]:
    """The objects whose hooks are called before the updates of an optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    return [_owner(hook) for hook in hooks.values()]


def _owner(hook: Any) -> object:
    owner = getattr(hook, "__self__", None)
    return _owner(owner._before) if isinstance(owner, Watch) else owner


def _may_nest(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` overrides another one, which it may call."""
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    # The last is that of Optimizer itself, which does nothing.
    return len({inspect.unwrap(step) for step in steps[:-1]}) > 1


def _is_outermost(optimizer: Optimizer) -> bool:
    """Whether the ``step`` that calls a hook is that of the optimizer's class, not of a base."""
    # Torch's function around each step knows it as func; the hook and this one stand between.
    running = sys._getframe(2).f_locals.get("func")
    return running is None or running is getattr(type(optimizer).step, "__wrapped__", running)
