"""The experiments in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments import torch_networks
from experiments.arms import Arm
from experiments.images import Batch, Images
from swa_torch import SWA, update_bn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Training:
    """See ``experiments.training.Training``."""

    def __init__(self, images: Images, seed: int):
        torch.manual_seed(seed)
        self._images, self._seed = images, seed
        experiment = images.experiment
        model = torch_networks.build(experiment.network, images.channels, images.classes, seed)
        self.model = model.to(DEVICE, memory_format=torch.channels_last)
        self._sgd = torch.optim.SGD(
            self.model.parameters(),
            lr=experiment.rate,
            momentum=experiment.momentum,
            weight_decay=experiment.weight_decay,
        )
        self.averages: dict[str, SWA] = {}
        self._snapshots: dict[str, list[int]] = {}

    def begin(self, arm: Arm) -> None:
        self._arm = arm
        # An optimizer that was wrapped keeps counting for the wrapper: the arm gets its own.
        state = self._sgd.state_dict()
        self._sgd = torch.optim.SGD(self.model.parameters(), **self._sgd.defaults)
        self._sgd.load_state_dict(state)
        steps = self._images.experiment.steps_per_epoch
        self.averages = {
            name: SWA(self._sgd, config, steps_per_epoch=steps) for name, config in arm.averages
        }
        self._snapshots = {name: [] for name in self.averages}

    def epoch(self, batches: Iterable[Batch], epoch: int) -> None:
        self.model.train()
        cyclical = any(config.lr for _, config in self._arm.averages)
        if epoch == self._arm.begin or not cyclical:  # from the first snapshot on it is [swa.lr]'s
            for group in self._sgd.param_groups:
                group["lr"] = self._arm.rate(epoch)
        # Several averages of one training: the last wrapper steps, and all count.
        optimizer = next(reversed(self.averages.values()), self._sgd)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(
                self.model(_images(x)), torch.from_numpy(y).long().to(DEVICE)
            ).backward()
            optimizer.step()
            for name, swa in self.averages.items():
                if swa.n_averaged > len(self._snapshots[name]):
                    self._snapshots[name].append(swa.updates)

    def snapshots(self, average: str) -> list[int]:
        return self._snapshots[average]

    def logits(self, average: str | None, *, bn: bool, images: int | None = None) -> np.ndarray:
        with self.averages[average].averaged() if average else nullcontext():
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            if bn:
                self.model.train()
                update_bn(self.model, map(_images, self._images.for_bn(self._seed)))
            self.model.eval()
            x = self._images.test_x[:images]
            with torch.no_grad():
                parts = [self.model(_images(x[i : i + 500])) for i in range(0, len(x), 500)]
                found = torch.cat(parts).cpu().numpy()
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])
            return found

    def average(self, average: str) -> list[np.ndarray]:
        return [_leaf(tensor) for tensor in self.averages[average].averaged_parameters]

    def state(self, *, averages: bool) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "sgd": self._sgd.state_dict()}
        if averages:
            state["averages"] = {name: swa.state_dict() for name, swa in self.averages.items()}
            state["snapshots"] = self._snapshots
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._sgd.load_state_dict(state["sgd"])
        for name, saved in state.get("averages", {}).items():
            self.averages[name].load_state_dict(saved)
        self._snapshots |= state.get("snapshots", {})


def _images(x: np.ndarray) -> torch.Tensor:
    # The strides of channels_last are those of the array itself.
    return torch.from_numpy(x).permute(0, 3, 1, 2).to(DEVICE)


def _leaf(tensor: torch.Tensor) -> np.ndarray:
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]
    return tensor.detach().cpu().numpy().transpose(axes)
