"""What each process of test_accelerate_on_ranks runs; FOLDER gets a file for each passed check."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from adapter_torch.training import batches, network, same, values
from ecosystem_torch.comparing import close, means
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from swa_torch import SWA

CONFIG = {"start": "4step", "every": "2step"}
DATA = [*batches(12)]


def replicated() -> tuple[Accelerator, torch.nn.Module]:
    """The same weights on every rank."""
    return Accelerator(cpu=True), network()


def sharded() -> tuple[Accelerator, torch.nn.Module]:
    """FSDP2, whose ``prepare`` puts other parameters into the optimizer's groups.

    Accelerate turns it on for accelerators only. What it does then runs on the CPU as well.
    """
    accelerator = Accelerator(cpu=True)
    # Each new AcceleratorState takes over what PartialState says.
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    torch.manual_seed(0)
    # 7 rows do not divide by 2.
    return accelerator, torch.nn.Sequential(
        torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
    )


KINDS = {"replicated": replicated, "sharded": sharded}


class Run:
    """A training on this rank's rows of each batch; without averaging, it keeps the snapshots."""

    def __init__(self, kind: str, *, averaging: bool = True) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator, model = KINDS[kind]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.swa = SWA(optimizer, CONFIG) if averaging else None
        self.model, self.optimizer = self.accelerator.prepare(model, self.swa or optimizer)
        self.snapshots: list[list[torch.Tensor]] = []

    def train(self, begin: int = 0, end: int = len(DATA)) -> Run:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for number in range(begin, end):
            x, y = (tensor[rank::ranks] for tensor in DATA[number])
            self.optimizer.zero_grad()
            self.accelerator.backward(mse_loss(self.model(x), y))
            self.optimizer.step()
            update = number + 1
            if update >= 4 and update % 2 == 0:
                self.snapshots.append(whole(self.model.parameters()))
        return self

    def end(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return whole(self.model.state_dict().values()), whole(self.swa.averaged_parameters)


def whole(tensors) -> list[torch.Tensor]:
    """Copies of tensors with all their shards."""
    return values(t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)


def check(kind: str, folder: Path) -> None:
    plain = Run(kind, averaging=False).train()
    run = Run(kind).train(end=6)
    assert run.accelerator.num_processes == 2
    run.accelerator.save_state(folder / "state")
    run.train(begin=6)
    weights, averages = run.end()
    assert (run.swa.updates, run.swa.n_averaged, run.swa.n_skipped) == (12, 5, 0)
    assert same(weights, whole(plain.model.state_dict().values()))
    assert close(averages, means(plain.snapshots))
    if kind == "sharded":
        kinds = {type(p) for group in run.swa.param_groups for p in group["params"]}
        assert {type(a) for a in run.swa.averaged_parameters} == kinds == {DTensor}

    resumed = Run(kind)
    resumed.accelerator.load_state(folder / "state")
    assert (resumed.swa.updates, resumed.swa.n_averaged) == (6, 2)
    resumed.train(begin=6)
    assert same(resumed.end()[0], weights)
    assert same(resumed.end()[1], averages)

    with run.swa.averaged(run.model):
        assert same(whole(run.model.parameters()), averages)
    assert same(run.end()[0], weights)
    # All ranks hold the same average.
    for average in averages:
        held = [torch.empty_like(average) for _ in range(2)]
        torch.distributed.all_gather(held, average)
        assert same(held[:1], held[1:])
    (folder / "passed").touch()


if __name__ == "__main__":
    for kind in KINDS:
        check(kind, Path(sys.argv[1]) / kind)
    torch.distributed.destroy_process_group()
    # Threads that gloo leaves behind now and then abort the interpreter's own end.
    os._exit(0)
