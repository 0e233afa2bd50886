"""What each of two processes sees of update_bn; started by torchrun, read by the test beside it.

Each scenario gets the rank and says what it saw; what it raises is part of that. The time limit
of the group turns a rank that waits for ever into an error.
"""

import contextlib
import datetime
import io
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from swa_torch import SWA, update_bn

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def share(rank, counts=(1, 3)):
    """The batches of a rank: ragged ones, and not as many as the other has."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (7, 16, 5)[: counts[rank]]
    draws = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in sizes]
    return [draw * (rank + 1) + n for n, draw in zip(sizes, draws, strict=True)]


def network(norm=nn.BatchNorm1d):
    """In float64: how float32 rounds between the layers is another process's own affair."""
    torch.manual_seed(3)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), norm(4), nn.Linear(4, 2)).double()


def statistics(model):
    """All statistics, the floats exactly."""
    return [[float(value).hex() for value in b.flatten().tolist()] for b in model.buffers()]


class Collectives(TorchDispatchMode):
    """Counts them by name. (CommDebugMode fails on modules without gradients.)"""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = str(function.overloadpacket)
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def counted(model, data, **options):
    """The collectives of an update, by name."""
    with Collectives() as mode:
        update_bn(model, data, **options)
    return mode.counts


@torch.enable_grad()
def with_gradients(model, batch):
    model(batch)


@scenario
def wrapped(rank):
    model = DistributedDataParallel(network())
    calls = counted(model, share(rank))
    return {
        "statistics": statistics(model),
        "calls": calls,
        "wrapper": [model.broadcast_buffers, model.require_forward_param_sync],
        "training": all(module.training for module in model.modules()),
    }


@scenario
def many_batches_and_layers(rank):
    layers = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(9))).double()
    model = DistributedDataParallel(layers)
    with Collectives() as plain:
        model(share(0)[0])
    calls = counted(model, share(rank) * 5, forward=with_gradients)
    return {"calls": calls, "a training forward": plain.counts}


@scenario
def a_rank_without_batches(rank):
    model = DistributedDataParallel(network())
    update_bn(model, share(rank, (0, 3)))
    return {"statistics": statistics(model)}


@scenario
def no_batches_at_all(rank):
    update_bn(DistributedDataParallel(network()), [])


@scenario
def synchronised_layers(rank):
    model = network(nn.SyncBatchNorm)
    model.append(nn.SyncBatchNorm(2, track_running_stats=False, dtype=torch.float64))  # would talk
    model[2].momentum = None
    update_bn(model, share(rank))
    return {
        "statistics": statistics(model),
        "training": all(module.training for module in model.modules()),
        "momentum": model[2].momentum,
    }


@scenario
def a_failing_rank(rank):
    model = DistributedDataParallel(network())
    before = statistics(model)

    def forward(model, batch):
        if rank == 1 and len(batch) == 5:
            raise ZeroDivisionError("on purpose")
        model(batch)

    try:
        update_bn(model, share(rank), forward=forward)
    finally:
        assert statistics(model) == before
        assert model.require_forward_param_sync
        model(share(0)[0]).sum().backward()  # the ranks are still in step


@scenario
def a_rank_that_cannot_start(rank):
    update_bn(DistributedDataParallel(network()), torch.zeros(4, 3) if rank else share(rank))


@scenario
def different_layers(rank):
    model = network()
    model[rank].requires_grad_(False)
    update_bn(model, share(rank), group=dist.group.WORLD)


@scenario
def unbuilt_layers(rank):
    model = nn.Sequential(nn.LazyBatchNorm1d())
    update_bn(model, share(rank), group=dist.group.WORLD)


@scenario
def nan_on_one_rank(rank):
    data = share(rank)
    data[0][0, 0] = float("nan") if rank else 0.0
    update_bn(DistributedDataParallel(network()), data)


@scenario
def plain_model(rank):
    model = network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_bn(model, share(rank))
    return {"statistics": statistics(model), "said": [str(w.message) for w in caught]}


@scenario
def one_process_alone(rank):
    model = network()
    if rank == 0:  # the other takes no part
        update_bn(model, share(rank), group=None)
    return {"statistics": statistics(model)}


@scenario
def named_group(rank):
    model = network()
    update_bn(model, share(rank), group=dist.group.WORLD)
    return {"statistics": statistics(model)}


@scenario
def a_group_of_others(rank):
    group = dist.new_group([0])
    update_bn(network(), share(rank), group=group)


@scenario
def sharded(rank):
    model = network()
    fully_shard(model)
    # An evaluation leaves the root's weights gathered, as they were then.
    with torch.no_grad():
        sharded = [*model.parameters()]
        model.eval()(share(0)[0])
        gathered = any(not hasattr(p, "device_mesh") for p in model.parameters())
        sharded[2].mul_(-2)  # the first linear layer's
    update_bn(model, iter(share(rank, (2, 2))))
    return {
        "statistics": statistics(model),
        "gathered": gathered,
        "sharded again": all(hasattr(p, "device_mesh") for p in model.parameters()),
    }


@scenario
def sharded_with_different_lengths(rank):
    model = network()
    fully_shard(model)
    update_bn(model, share(rank))


@scenario
def averaged(rank):
    inner = network()
    model = DistributedDataParallel(inner)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SWA(sgd, {"start": "1step", "every": "1step"})
    for x in share(rank, (2, 2)):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = statistics(model)
    with optimizer.averaged(model, bn_data=share(rank)):
        inside = statistics(model)
    assert statistics(model) == before
    return {"statistics": inside}


@scenario
def progress(rank):
    model = DistributedDataParallel(network())
    with contextlib.redirect_stderr(io.StringIO()) as bars:
        update_bn(model, share(rank), progress=True)
    return {"bars": bars.getvalue().count("update_bn: 100%")}


def main(folder):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    rank = dist.get_rank()
    seen = {}
    for name, function in SCENARIOS.items():
        try:
            seen[name] = {"result": function(rank)}
        except Exception as error:
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
        dist.barrier()
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump(seen, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
