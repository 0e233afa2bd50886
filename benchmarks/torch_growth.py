"""Growth in PyTorch: ours, the fastest peers, and the loop in C."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from growth import Beside
from torch_peers import CONTENDERS
from torch_reference import MovingWeights
from torch_sets import fill

PACKAGES = ("torch", "numpy", "timm", "ema-pytorch")
NAMES = (
    "C loop",
    'swa_torch, nonfinite="keep"',
    'swa_torch, nonfinite="skip"',
    "AveragedModel, swa_multi_avg",
    "timm ModelEmaV3",
    "ema-pytorch EMA",
)
# Of the weights: themselves, an average for each, and one while a tensor is checked.
COPIES = 1 + len(NAMES) + 1


def beside(count: int, n_weights: int) -> Beside:
    """So many tensors of so many weights in all."""
    # Four to a module, as in the set of many small tensors.
    shapes = {f"blocks.{n // 4}.weight{n % 4}": (n_weights // count,) for n in range(count)}
    module = fill(torch.nn.Module(), shapes, torch.float32)
    weights = MovingWeights(module.parameters())
    chosen = [who for who in CONTENDERS if who.name in NAMES]
    absent = {who.name: why for who in chosen if (why := who.missing()) is not None}
    here = [who for who in chosen if who.name not in absent]
    running = {who.name: who.build(module) for who in here}

    def errors() -> Mapping[str, float]:
        return {who.name: weights.error(running[who.name].averages(), who.mix) for who in here}

    updates = {name: each.update for name, each in running.items()}
    return Beside(updates, weights.move, errors, absent)
