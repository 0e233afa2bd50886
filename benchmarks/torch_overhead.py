"""What averaging costs in PyTorch, beside torch's own: one snapshot, and an update that is none.

    python benchmarks/torch_overhead.py [--rounds 20]

The inner optimizer does nothing, so that averaging alone is timed. The weights stand still, so the
averages must equal them; that is checked after the timing.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from timing import interleaved, table
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from swa_torch import SWA

ALWAYS = {"start": "1step", "every": "1step"}
NEVER = {"start": "1000000000step", "every": "1step"}
CALLS = 1000


class Idle(torch.optim.Optimizer):
    """An optimizer whose step costs next to nothing."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    def step(self, closure=None) -> None:
        pass


def model(sizes) -> torch.nn.ParameterList:
    torch.manual_seed(0)
    return torch.nn.ParameterList(torch.randn(int(size)) for size in sizes)


def snapshots(rounds: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(64, 2048, 107), *rng.integers(100_000, 850_000, 54)]
    weights = model(sizes)
    ours = {
        guard: SWA(Idle(weights.parameters()), {**ALWAYS, "nonfinite": guard})
        for guard in ("skip", "keep")
    }
    theirs = {
        "AveragedModel, multi_avg_fn": AveragedModel(weights, multi_avg_fn=get_swa_multi_avg_fn()),
        "AveragedModel, default": AveragedModel(weights),
    }
    contenders = {f'swa_torch, nonfinite="{guard}"': ours[guard].step for guard in ("keep", "skip")}
    for name, averaged in theirs.items():
        contenders[name] = lambda averaged=averaged: averaged.update_parameters(weights)
    times = interleaved(contenders, rounds)
    print(
        table(
            f"A snapshot: {sum(sizes) / 1e6:.1f} M float32 weights in {len(sizes)} tensors", times
        )
    )
    for swa in ours.values():
        assert swa.n_averaged == rounds + 1
        for mean, weight in zip(swa.averaged_parameters, weights, strict=True):
            torch.testing.assert_close(mean, weight.detach(), rtol=1e-6, atol=0)


def skipped_updates(rounds: int) -> None:
    weights = model([1000] * 100)
    bare = Idle(weights.parameters())
    swa = SWA(Idle(weights.parameters()), NEVER)

    def repeat(step):
        for _ in range(CALLS):
            step()

    times = interleaved(
        {
            "the bare optimizer's step": lambda: repeat(bare.step),
            "in swa_torch": lambda: repeat(swa.step),
        },
        rounds,
    )
    print(table("An update that is no snapshot, 100 tensors", times, calls=CALLS))
    assert swa.n_averaged == 0
    assert swa.updates == CALLS * (rounds + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds\n")
    snapshots(rounds)
    print()
    skipped_updates(rounds)


if __name__ == "__main__":
    main()
