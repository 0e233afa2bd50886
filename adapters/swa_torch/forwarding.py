"""An optimizer that is another one, for whoever asks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from swa_torch.flattening import groups_to_find, state_to_find


class Forwarding(Optimizer):
    """An optimizer whose groups, state, defaults, hooks and abilities are those of another.

    Attributes:
      optimizer: the other one.
    """

    # A fused optimizer that supports this is stepped even for a gradient overflow, and skips in
    # its kernel, where nobody can count. Without it GradScaler does not call step() then.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is left out: it would give this object groups and state of its own.
        self.optimizer = optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer; it joins the average with its own count."""
        self.optimizer.add_param_group(param_group)

    # Loading replaces groups and state with new objects, so they are asked for each time.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer."""
        return groups_to_find(self.optimizer.param_groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the wrapped optimizer; the averages are not in it."""
        return state_to_find(self.optimizer.state)

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # train() and eval() of the schedule-free optimizers, for example. Private names are not
        # forwarded: they would tell of abilities (see above) that the wrapper does not share.
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.optimizer, name)

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called before each update."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called after each update.

        Hooks are called in the order they are registered, and the average's is one of them. One
        that changes the weights is to be registered before the optimizer is wrapped; one that
        reads the average comes after it.
        """
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called before its state is saved."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer; it sees the state before the average is in."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer; it sees the state without the average."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Registers a hook on the wrapped optimizer, called after its state was loaded."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)
