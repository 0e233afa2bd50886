"""Drives ``swa_torch`` for the conformance kit: a module, its optimizer, and torch.save."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch

from swa_core.config import SWAConfig
from swa_core.testing.driver import Weights
from swa_torch import SWA


class Scripted(torch.optim.Optimizer):
    """Its step copies the weights it was told, as any optimizer writes those it computed."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})
        self.script: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, value in zip(self.param_groups[0]["params"], self.script, strict=True):
            parameter.copy_(value)


class TorchDriver:
    """Weights are parameters (frozen: without gradients), integers are buffers."""

    expected_failures: ClassVar[Mapping[str, str]] = {}

    def start(
        self,
        weights: Weights,
        config: SWAConfig,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        frozen: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.model = torch.nn.Module()
        tied = tied or {}
        for name, leaf in weights.items():
            value = to_torch(leaf)
            if not value.is_floating_point():
                self.model.register_buffer(name, value)
            elif name not in tied:
                parameter = torch.nn.Parameter(value, requires_grad=name not in frozen)
                self.model.register_parameter(name, parameter)
        for alias, name in tied.items():
            self.model.register_parameter(alias, getattr(self.model, name))
        self.names = [name for name, _ in self.model.named_parameters()]
        self.aliases = dict(tied)
        self.inner = Scripted(self.model.parameters())
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.optimizer = SWA(self.inner, config, **lengths)

    def train(self, weights: Weights) -> None:
        values = {name: to_torch(leaf) for name, leaf in weights.items()}
        group = self.inner.param_groups[0]["params"]
        held = [name for name in self.names if name in values]
        for name in [*held, *(name for name, _ in self.model.named_buffers())]:
            old = getattr(self.model, name)
            if old.shape != values[name].shape or old.dtype != values[name].dtype:
                # Somebody rebuilt a layer, and put its parameter where the old one was.
                new = torch.nn.Parameter(values[name], requires_grad=False)
                setattr(self.model, name, new)
                group[:] = [new if parameter is old else parameter for parameter in group]
        if len(held) < len(group):
            group[:] = [getattr(self.model, name) for name in held]
        self.inner.script = [values[name] for name in held]
        self.optimizer.step()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(values[name])

    def weights(self) -> Weights:
        return {name: to_numpy(value) for name, value in self.model.state_dict().items()}

    def average(self) -> Weights:
        averages = zip(self.names, self.optimizer.averaged_parameters, strict=True)
        held = {name: to_numpy(average) for name, average in averages}
        return held | {alias: held[name].copy() for alias, name in self.aliases.items()}

    def n_averaged(self) -> int:
        return self.optimizer.n_averaged

    def n_skipped(self) -> int:
        return self.optimizer.n_skipped

    def averaged(self) -> AbstractContextManager[Any]:
        return self.optimizer.averaged()

    def finalize(self) -> None:
        self.optimizer.finalize()

    def save(self) -> bytes:
        saved = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, saved)
        return saved.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def to_torch(leaf: Any) -> torch.Tensor:
    """A copy of a numpy array; torch does not know numpy's bfloat16."""
    if leaf.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(leaf.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(leaf))


def to_numpy(tensor: torch.Tensor) -> Any:
    """A copy of a tensor as a numpy array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy().copy()
