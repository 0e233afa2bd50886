"""torch's ZeroRedundancyOptimizer inside: weights on every rank, their optimizer's state on one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from adapter_torch.distributed.checkpoint_checks import agree, told
from adapter_torch.distributed.training import CONFIG, adam, averaging, network, train
from torch.nn.parallel import DistributedDataParallel

from swa_torch import SWA


def fresh() -> tuple[torch.nn.Module, SWA]:
    with warnings.catch_warnings():
        # Importing it warns of torch's own use of torch.jit.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = DistributedDataParallel(network())
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    return model, SWA(zero, CONFIG)


def check_the_average_is_that_of_the_plain_optimizer(folder: Path) -> None:
    model, optimizer = fresh()
    train(model, optimizer, 0, 5)
    plain_model = DistributedDataParallel(network())
    plain = averaging(plain_model, adam)
    train(plain_model, plain, 0, 5)
    agree(told(model, optimizer), told(plain_model, plain))


def check_its_consolidated_state_goes_on(folder: Path) -> None:
    model, optimizer = fresh()
    train(model, optimizer, 0, 5)
    optimizer.consolidate_state_dict(to=0)  # forwarded to the wrapped optimizer
    # As written to disk: what it holds goes on changing.
    states = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5, 8)
    twin_model, twin = fresh()
    twin_model.load_state_dict(weights)
    twin.load_state_dict(states[0])
    train(twin_model, twin, 5, 8)
    agree(told(twin_model, twin), told(model, optimizer))


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
