"""Batch-norm statistics of the averaged weights: those of the pooled data, exactly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from swa_core.errors import BatchNormError, NonFiniteStatisticsError, SWAWarning
from swa_torch.batches import call, device_of, moved, progress_bar
from swa_torch.observing import as_in_training, keeps_statistics, observed
from swa_torch.pooling import Pool
from swa_torch.pooling_across_ranks import Ranks, group_of, is_group, own_forward
from swa_torch.preserving import Buffers, preserved
from swa_torch.sharding import are_distributed, reshard

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def update_bn(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    progress: bool = False,
    group: Any = "auto",
) -> None:
    """Recomputes the running statistics of all batch-norm layers from ``data``, in one pass.

    Each layer gets the mean and the (unbiased, as torch keeps it) variance over all elements it
    sees, pooled in float64: batches count by their size, and what differs between batches counts
    too. ``num_batches_tracked`` becomes the number of batches behind them. The model computes as
    in training: one that is wholly in evaluation is set to ``train()`` for the pass. A subclass
    with a forward of its own is watched for what it gives to ``F.batch_norm``; one that does
    without is taken to normalise its first argument.

    Frozen layers are left alone and normalise with what they have: those whose affine parameters
    require no gradient, and those in evaluation while their model is training. So are layers of
    other kinds that keep statistics (InstanceNorm). Everything else is as before afterwards,
    whatever is raised: training flags, momentum, other buffers, random number generators
    (torch's, numpy's, Python's, the loader's own).

    In several processes each passes its own share of the data, in as many batches as it has (also
    none), and all get the statistics of the whole, the same to the last bit. They talk twice,
    before the first batch and after the last, and if a rank fails, all raise. All ranks of the
    group must call. Meanwhile SyncBatchNorm normalises with the batch of its own rank. Only
    sharded weights (FSDP) need the same number of batches on every rank.

    Args:
      model: on any device; batches are brought there. If it is spread over several, they are not.
      data: batches, iterated over once: tensors, tuples or lists (the first entry is the model's
        input), or mappings (the model's keyword arguments), those of Hugging Face among them.
      forward: called as ``forward(model, batch)`` instead, for every other kind of batch.
      progress: show a bar (of tqdm), on the first rank.
      group: the process group over which the statistics are pooled, or None for this process
        alone. "auto": that of DistributedDataParallel, fully_shard or SyncBatchNorm in the model.
        A model without any is updated alone, and a warning says so if there are other processes.

    Raises:
      BatchNormError: no batches, a batch of one value per channel, layers that no batch reaches
        or that are scripted, statistics with NaN or Inf, or ranks that differ or failed. The
        statistics stay as they were.
      TypeError: a batch of unknown structure and no ``forward``, or one batch for many.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2; the pooling: Chan, Golub & LeVeque 1983.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> update_bn(layer, [torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[7.0], [10.0]])])
    >>> layer.running_mean, layer.running_var
    (tensor([4.]), tensor([18.5000]))
    """
    reshard(model)
    ranks = Ranks(_chosen(group, model), model)
    with preserved(model, data), ExitStack() as undo:
        layers: dict[str, _BatchNorm] = {}
        fault: Exception | None = None
        try:
            _refuse_one_batch(data)
            layers = undo.enter_context(as_in_training(model))
        except Exception as error:
            fault = error
        ranks.begin(layers, data, fault)
        pools = {layer: Pool(name) for name, layer in layers.items()}
        n_batches = 0
        try:
            if pools:
                undo.enter_context(own_forward(model))
                with progress_bar(data, progress and ranks.is_first) as batches:
                    n_batches = _pass(model, batches, forward or call, pools)
        except Exception as error:
            # (An interrupt leaves at once, and the others lose the connection.)
            if not ranks.can_agree:
                raise
            fault = error
    if not pools:
        _say(f"{_why_nothing(model)}: nothing to update.")
        return
    n_batches = ranks.pooled(pools, n_batches, fault)
    _refuse_unseen(pools.values(), n_batches)
    _write(pools)
    if missed := [pool.name for pool in pools.values() if not (pool.count or pool.is_fixed)]:
        _say(f"no batch reached {', '.join(missed)}: their statistics stay as they were.")


class Statistics(AbstractContextManager[None]):
    """Restores the batch-norm statistics of a model at the end of a block.

    Args:
      model: the model; None for nothing to restore.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._model = model
        self._buffers: Buffers | None = None

    def __enter__(self) -> None:
        if self._model is not None:
            layers = [module for module in self._model.modules() if keeps_statistics(module)]
            self._buffers = Buffers(layers, _STATISTICS)

    def __exit__(self, *raised: object) -> None:
        if self._buffers is not None:
            self._buffers.restore()


def _pass(
    model: torch.nn.Module,
    data: Iterable[Any],
    forward: Callable[[torch.nn.Module, Any], Any],
    pools: dict[_BatchNorm, Pool],
) -> int:
    """Passes all batches through the model; their number."""
    device = device_of(model)
    n_batches = 0
    with torch.no_grad(), observed(pools), _uncompiled():
        for batch in data:
            n_batches += 1
            forward(model, moved(batch, device))
    return n_batches


def _uncompiled() -> AbstractContextManager[Any]:
    # Compiled code does not call hooks that were added to it later. What compiles is slow to
    # import, and who has not done so has compiled nothing.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _write(pools: dict[_BatchNorm, Pool]) -> None:
    """Makes the pooled statistics those of the layers; all of them or none."""
    written: list[tuple[_BatchNorm, Pool, Tensor, Tensor]] = []
    for layer, pool in pools.items():
        if pool.count:
            assert layer.running_mean is not None
            to = {"device": layer.running_mean.device, "dtype": layer.running_mean.dtype}
            written.append((layer, pool, pool.mean.to(**to), pool.variance().to(**to)))
    # The only time that the host waits for the device. The meta device holds no values to see.
    looked_at = [entry for entry in written if not entry[2].is_meta]
    if looked_at:
        sound = [(mean + var).isfinite().all() for _, _, mean, var in looked_at]
        flags = torch.stack([flag.to(sound[0].device) for flag in sound]).tolist()
        seen = zip(looked_at, flags, strict=True)
        spoilt = [pool.name for (_, pool, *_), is_sound in seen if not is_sound]
        if spoilt:
            raise NonFiniteStatisticsError(
                f"the statistics of {', '.join(spoilt)} would hold NaN or Inf.",
                hint="look for them in the data and in the weights; a variance may also be too "
                "large for the dtype of the layer.",
            )
    with torch.no_grad():
        for layer, pool, mean, variance in written:
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(variance)  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(pool.batches)


def _refuse_one_batch(data: Any) -> None:
    if isinstance(data, (Tensor, Mapping, str)):
        raise TypeError(
            f"data must be an iterable of batches, got one {type(data).__name__}; "
            "put a single batch into a list"
        )


def _refuse_unseen(pools: Collection[Pool], n_batches: int) -> None:
    if not n_batches:
        raise BatchNormError(
            "there are no batches, so there are no statistics.",
            hint="pass the training data; an iterator that was read before is empty.",
        )
    if not any(pool.count or pool.is_fixed for pool in pools):
        raise BatchNormError(
            f"no batch reached any of the {len(pools)} batch-norm layers.",
            hint="if forward= was given, it must call the model it is handed.",
        )


def _chosen(group: Any, model: torch.nn.Module) -> Any:
    """The process group that is meant, or None for this process alone."""
    if group != "auto":
        if group is not None and not is_group(group):
            raise TypeError(
                f'group must be a process group, None or "auto", got {type(group).__name__}'
            )
        return group
    found = group_of(model)
    if found is None and are_distributed() and dist.get_world_size() > 1:
        _say(
            f"{type(model).__name__} is not wrapped for training in several processes, so its "
            f"batch norm is updated from this one's data alone, and {dist.get_world_size()} "
            "processes may come to differ. Pass the wrapped model, or update_bn(..., group=...), "
            "with None if that is meant.",
            stacklevel=4,
        )
    return found


def _why_nothing(model: torch.nn.Module) -> str:
    name = type(model).__name__
    if any(keeps_statistics(module) for module in model.modules()):
        return f"every batch norm of {name} is frozen"
    return f"{name} has no batch norm that keeps statistics"


def _say(message: str, stacklevel: int = 3) -> None:
    warnings.warn(message, SWAWarning, stacklevel=stacklevel)
