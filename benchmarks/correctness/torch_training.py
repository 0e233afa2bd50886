"""Trainings in PyTorch: a small module, an optimizer that goes where the script says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from correctness.cells import NotApplicableError
from correctness.peer import Outcome, Statistics, Training, Tree
from correctness.scripts import Array, Intent, Script, batches

Buffer = Array | int


class Follow(torch.optim.Optimizer):
    """Assigns gradients: the step leads to the weights that are handed over as such."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(parameter.grad)
        return loss


class Model(Module):
    """``x @ kernel + bias``, then the parts that a script asks for.

    It is built from the script's initial weights. Tied weights are one parameter with two names.
    """

    def __init__(self, script: Script) -> None:
        super().__init__()
        fill(self, script)

    def forward(self, x: Tensor) -> Tensor:
        return forward(self, x)


def fill(module: Module, script: Script) -> None:
    """Puts the model's parts into a module."""
    dtype = getattr(torch, script.dtype)
    for name, value in script.at(0).items():
        parameter = torch.nn.Parameter(torch.tensor(value, dtype=dtype))
        module.register_parameter(name, parameter)
    if script.tied:
        module.tied = module.kernel
    if script.counts is not None:
        module.register_buffer("count", torch.tensor(script.counts[0]))
    if script.batch_norm:
        module.norm = torch.nn.BatchNorm1d(script.bias.shape[1], affine=False)


def forward(module: Module, x: Tensor) -> Tensor:
    """What the model computes."""
    y = x @ module.kernel + module.bias
    return module.norm(y) if hasattr(module, "norm") else y


def host(tensor: Tensor) -> Array:
    """A float64 copy."""
    return tensor.detach().double().numpy(force=True).copy()


def weights_of(module: Module) -> dict[str, Array]:
    """Kernel, bias and, where the kernel has one, its other name."""
    names = ("kernel", "bias", *(("tied",) if hasattr(module, "tied") else ()))
    return {name: host(getattr(module, name)) for name in names}


def statistics_of(module: Module) -> dict[str, Array]:
    """The running statistics of its batch norm."""
    return {"mean": host(module.norm.running_mean), "var": host(module.norm.running_var)}


def targets(script: Script) -> list[dict[str, Tensor]]:
    """The weights of every update as tensors."""
    dtype = getattr(torch, script.dtype)
    kernel, bias = torch.tensor(script.kernel).to(dtype), torch.tensor(script.bias).to(dtype)
    return [{"kernel": k, "bias": b} for k, b in zip(kernel, bias, strict=True)]


class TorchTraining(Training):
    """The loop that a user of PyTorch writes; subclasses put the averager into it.

    Args:
      script: what happens.
      intent: which updates the user wants to be snapshots, None for all.
      compiled: whether the loop trains ``torch.compile`` of the model.
    """

    def __init__(
        self, script: Script, intent: Intent | None = None, *, compiled: bool = False
    ) -> None:
        self.script, self.intent = script, intent
        self.model = Model(script)
        self.trained = torch.compile(self.model) if compiled else self.model
        self.targets = targets(script)
        self.inputs = [torch.tensor(x) for x in batches(script)] if script.batch_norm else []
        self.optimizer = self.make_optimizer(self.model.parameters())
        self.make_averager()

    # What subclasses have to say.

    def make_optimizer(self, parameters: Iterable[Tensor]) -> Any:
        """The optimizer of the loop."""
        return Follow(parameters)

    def make_averager(self) -> None:
        """Whatever is made before the loop."""

    def after_step(self, update: int) -> None:
        """What the loop does after the optimizer's step number ``update``."""

    def averages(self) -> list[Tensor]:
        """The averages in the order of the model's parameters, in their own precision."""
        raise NotImplementedError

    @contextlib.contextmanager
    def model_to_evaluate(self) -> Iterator[Module]:
        """The module that a user evaluates, the average in it."""
        with self.evaluated():
            yield self.model

    def recompute(self, module: Module, inputs: list[Tensor]) -> str:
        """Recomputes batch norm in it and says by what; "" for who does not."""
        return ""

    # The rest follows.

    def step(self, update: int) -> None:
        if self.script.counts is not None:
            self.model.count.fill_(self.script.counts[update])
        if self.inputs:
            self.model.train()
            self.model(self.inputs[update % len(self.inputs)])
        for name, target in self.targets[update].items():
            getattr(self.model, name).grad = target.clone()
        self.optimizer.step()
        self.after_step(update)

    def live(self) -> Tree:
        return weights_of(self.model)

    def outcome(self) -> Outcome:
        averages = self.averages()
        average = dict(zip(("kernel", "bias"), map(host, averages), strict=True))
        outcome = Outcome(average, str(averages[0].dtype).removeprefix("torch."), self.live())
        if self.script.tied or self.script.counts is not None:
            with self.model_to_evaluate() as module:
                if self.script.tied:
                    average["tied"] = host(module.tied)
                    outcome.tied = module.tied is module.kernel
                if self.script.counts is not None:
                    outcome.count = float(module.count)
        return outcome

    def batch_norm(self, inputs: list[Array]) -> Statistics:
        training = statistics_of(self.model)
        with self.model_to_evaluate() as module:
            how = self.recompute(module, [torch.tensor(x) for x in inputs])
            return Statistics(weights_of(module), statistics_of(module), training, False, how)

    def shares_memory(self) -> bool:
        live = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        return any(each.untyped_storage().data_ptr() in live for each in self.averages())

    # Saving: the model, the optimizer and what the averager calls its state.

    def state(self) -> dict[str, Any]:
        """What a user saves, by the names of this training's attributes."""
        raise NotApplicableError("nothing to save")

    def restore(self, state: dict[str, Any]) -> None:
        """Loads it into what was just made."""
        for name, saved in state.items():
            getattr(self, name).load_state_dict(saved)

    def save(self) -> bytes:
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | self.state(), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        self.restore(torch.load(io.BytesIO(saved), weights_only=False))


class SecondModelTraining(TorchTraining):
    """Those that keep the average in a second module, which is evaluated.

    Subclasses make ``averager`` and say which module of it that is.
    """

    averager: Any

    def averaged_module(self) -> Module:
        """The second module."""
        raise NotImplementedError

    def averages(self) -> list[Tensor]:
        module = self.averaged_module()
        return [module.kernel, module.bias]

    @contextlib.contextmanager
    def model_to_evaluate(self) -> Iterator[Module]:
        yield self.averaged_module()

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        raise NotApplicableError("nothing is swapped: a second model")

    def state(self) -> dict[str, Any]:
        return {"averager": self.averager.state_dict()}


def numpy_of(values: Iterable[Tensor]) -> list[Array]:
    """Float64 copies of several."""
    return [np.asarray(host(value)) for value in values]
