"""Growth in PyTorch: ours, the fastest peers, and the loop in C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from growth import Beside
from torch_peers import CONTENDERS
from torch_reference import MovingWeights
from torch_sets import fill

PACKAGES = ("torch", "numpy", "timm", "ema-pytorch")
OURS = 'swa_torch, nonfinite="skip"'
# Of the weights, measured; see ``growth.affordable``.
COPIES = {
    "": 2.7,
    OURS: 1,
    'swa_torch, nonfinite="keep"': 1,
    "C loop": 1,
    "AveragedModel, swa_multi_avg": 1,
    "timm ModelEmaV3": 1,
    "ema-pytorch EMA": 1,
}


def beside(count: int, n_weights: int, names: Sequence[str]) -> Beside:
    """So many tensors of so many weights in all, averaged by these."""
    # Four to a module, as in the set of many small tensors.
    shapes = {f"blocks.{n // 4}.weight{n % 4}": (n_weights // count,) for n in range(count)}
    module = fill(torch.nn.Module(), shapes, torch.float32)
    weights = MovingWeights(module.parameters())
    chosen = [who for who in CONTENDERS if who.name in names]
    absent = {who.name: why for who in chosen if (why := who.missing()) is not None}
    here = [who for who in chosen if who.name not in absent]
    running = {who.name: who.build(module) for who in here}

    def errors() -> Mapping[str, float]:
        return {who.name: weights.error(running[who.name].averages(), who.mix) for who in here}

    updates = {name: each.update for name, each in running.items()}
    return Beside(updates, weights.move, errors, absent)
