"""Trains on digits with averaging and survives being killed: start it again, and it goes on.

    python examples/resume_torch.py --checkpoint out/resume_torch.pt

Killed at any moment (kill -9, a power cut, while it writes) and started again, it ends with the
weights, the average and the batch-norm statistics of a run that nobody stopped, to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Data, load
from torch import nn
from torch.nn import functional as F

from swa_core import SWAConfig
from swa_torch import SWA

BATCH_SIZE = 64


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a file so that at any moment either the former or the new one is there, whole."""
    partial = path.with_name(f"{path.name}.partial")  # in the same folder: a rename moves no data
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name is
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def network(data: Data) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.1),  # draws random numbers, so their state belongs into the checkpoint
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, data.classes),
    )


def inner_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def images(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def train(
    data: Data,
    config: SWAConfig | Path,
    checkpoint: Path,
    *,
    epochs: int = 10,
    save_every: int = 10,
    seed: int = 0,
) -> tuple[nn.Module, SWA]:
    """Trains from the checkpoint on, if there is one, and ends on the average."""
    torch.manual_seed(seed)
    model = network(data)
    steps = data.steps_per_epoch(BATCH_SIZE)
    optimizer = SWA(
        inner_optimizer(model),
        config,
        steps_per_epoch=steps,
        total_steps=epochs * steps,
    )
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])  # the model first
        optimizer.load_state_dict(state["optimizer"])  # it holds the average and all counters
        torch.set_rng_state(state["random"])
        print(f"resumed at update {optimizer.updates}")

    x, y = images(data.train_x), torch.from_numpy(data.train_y).long()
    while optimizer.updates < epochs * steps:
        # Where the training is in the data follows from the number of updates.
        epoch, step = divmod(optimizer.updates, steps)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
        for rows in order.split(BATCH_SIZE)[step:]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if optimizer.updates % save_every == 0:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                }
                save(state, checkpoint)

    # After the last checkpoint: a run that is stopped from here on does it again.
    optimizer.finalize(model, bn_data=x.split(1000))
    return model, optimizer


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    right = model(images(data.test_x)).argmax(1) == torch.from_numpy(data.test_y)
    return float(right.float().mean())


def digest(model: nn.Module, optimizer: SWA) -> str:
    """A few characters that tell any two results apart."""
    bits = hashlib.sha256()
    for tensor in [*model.state_dict().values(), *optimizer.averaged_parameters]:
        bits.update(tensor.detach().numpy().tobytes())
    bits.update(repr((optimizer.updates, optimizer.n_averaged, optimizer.n_skipped)).encode())
    return bits.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("out/resume_torch.pt"))
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "swa.toml")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=10, help="in updates")
    options = parser.parse_args(arguments)
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data = load("digits")
    lengths = {"epochs": options.epochs, "save_every": options.save_every}
    model, optimizer = train(data, options.config, options.checkpoint, **lengths)
    print(
        f"{optimizer.updates} updates, {optimizer.n_averaged} snapshots, "
        f"accuracy {accuracy(model, data):.4f}, digest {digest(model, optimizer)}"
    )


if __name__ == "__main__":
    main()
