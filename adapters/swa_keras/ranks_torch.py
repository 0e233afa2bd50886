"""Models that torch trains in several processes, each of which sees its share of the data alone.

On jax nothing of this is needed: where ``keras.distribution`` spans processes, every one of them
computes with the data of all.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from swa_core import BatchNormError, SWAWarning
from swa_keras.pooling import Pool


def unwrapped(model: Any) -> Any:
    """The Keras model inside ``DistributedDataParallel``, or the model itself."""
    return model.module if _is_wrapped(model) else model


def group_of(model: Any) -> Any:
    """The processes that share the data of a wrapped model; None for this one alone.

    Warns where the model is not wrapped, and others may have data that it does not know of.
    """
    if _is_wrapped(model):
        return model.process_group
    if keras.backend.backend() == "torch":
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"SWA: batch norm is updated from the data of this process alone, and the "
                f"{dist.get_world_size()} processes may come to differ. Pass the model wrapped in "
                "DistributedDataParallel, on every process, to pool the data of all.",
                SWAWarning,
                stacklevel=4,
            )
    return None


@contextmanager
def pooled_by_all(group: Any, names: Sequence[str], pools: Sequence[Pool]) -> Iterator[None]:
    """After the block, in which they fill with this process's data, the pools hold that of all.

    One collective, at the end, which also tells of a failure, so that nobody waits for who failed.

    Args:
      group: of processes; None if there are no others.
      names: of the layers, which should be the same everywhere.
      pools: theirs. All processes come to hold the same, to the last bit.

    Raises:
      BatchNormError: another process failed, or has other layers.
    """
    if group is None:
        yield
        return
    import torch.distributed as dist

    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    mine = None if fault else [(pool.count, pool.mean, pool.squares) for pool in pools]
    said = (str(fault) if fault else None, [*names], mine)
    all_said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_said, said, group=group)
    if fault is not None:
        raise fault
    for rank, (failure, others, _) in enumerate(all_said):
        if failure is not None:
            raise BatchNormError(
                f"process {rank} of {len(all_said)} failed to pool its data: {failure}",
                hint="mend it there; no process has changed its model.",
            )
        if others != said[1]:
            raise BatchNormError(
                f"process {rank} would update the layers {others}, and this one {said[1]}.",
                hint="build, freeze and wrap the model alike in every process.",
            )
    for pool, *moments in zip(pools, *(theirs for _, _, theirs in all_said), strict=True):
        pool.take(moments)


def _is_wrapped(model: Any) -> bool:
    parallel = sys.modules.get("torch.nn.parallel")
    return parallel is not None and isinstance(model, parallel.DistributedDataParallel)
