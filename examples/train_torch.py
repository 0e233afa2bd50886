"""The demo's network in PyTorch. What averaging adds to the training loop is marked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from data import Data
from record import LINE, Record, score
from torch import nn
from torch.nn import functional as F

from swa_core import SWAConfig
from swa_torch import SWA, update_bn


def network(data: Data) -> nn.Module:
    channels = data.train_x.shape[-1]
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, data.classes),
    )
    for layer in model:  # LeCun's initialisation, as in the other frameworks
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    nn.init.zeros_(model[-1].bias)
    return model


def to_tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y).long()


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    model.eval()
    return torch.cat([model(part) for part in x.split(1000)]).numpy()


def train(
    data: Data,
    config: SWAConfig,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    curves: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Trains with averaging."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = network(data)
    steps_per_epoch = data.steps_per_epoch(batch_size)
    test_x, _ = to_tensors(data.test_x, data.test_y)
    for_bn = to_tensors(data.for_bn, data.train_y)[0].split(1000)
    record = Record()

    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    optimizer = SWA(  # averaging: wrap the optimizer; the loop does not change
        optimizer, config, steps_per_epoch=steps_per_epoch, total_steps=epochs * steps_per_epoch
    )

    for _ in range(epochs):
        model.train()
        for x, y in data.batches(batch_size, rng):
            x, y = to_tensors(x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if optimizer.n_averaged > len(record.snapshots):
                record.snapshots.append(optimizer.updates)
        if curves:
            record.last.append(score(logits(model, test_x), data.test_y).nll)
            if optimizer.n_averaged:
                with optimizer.averaged(model, bn_data=for_bn):  # averaging: evaluate on it
                    record.average.append(score(logits(model, test_x), data.test_y).nll)
            else:
                record.average.append(None)
        progress()

    record.scores["last"] = score(logits(model, test_x), data.test_y)
    with optimizer.averaged():
        record.scores["average"] = score(logits(model, test_x), data.test_y)
    if curves:
        record.line = loss_along_line(model, optimizer, for_bn, test_x, data.test_y)
    optimizer.finalize(model, bn_data=for_bn)  # averaging: keep it
    record.scores["average + update_bn"] = score(logits(model, test_x), data.test_y)
    return record


def train_annealed(
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """The baseline without averaging: the rate annealed to zero along a cosine."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = network(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    steps = epochs * data.steps_per_epoch(batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        for x, y in data.batches(batch_size, rng):
            x, y = to_tensors(x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        progress()
    test_x, _ = to_tensors(data.test_x, data.test_y)
    return Record(scores={"annealed": score(logits(model, test_x), data.test_y)})


def loss_along_line(
    model: nn.Module, optimizer: SWA, for_bn: tuple[torch.Tensor, ...], test_x: torch.Tensor, test_y
) -> list[float]:
    """The test loss on the line through the last weights (0) and their average (1)."""
    parameters = list(model.parameters())
    last = [p.detach().clone() for p in parameters]
    losses = []
    for t in LINE:
        with torch.no_grad():
            for p, a, b in zip(parameters, last, optimizer.averaged_parameters, strict=True):
                p.copy_(a + t * (b - a))
        update_bn(model, for_bn)
        losses.append(score(logits(model, test_x), test_y).nll)
    with torch.no_grad():
        for p, a in zip(parameters, last, strict=True):
            p.copy_(a)
    return losses
