"""Batch-norm statistics of the averaged weights: those of the pooled data, exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from swa_core import trees
from swa_core.errors import BatchNormError, SWAWarning
from swa_torch.preserving import Buffers, device_of, preserved

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def update_bn(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
) -> None:
    """Recomputes the running statistics of all batch-norm layers from ``data``, in one pass.

    Each layer gets the mean and the (unbiased, as torch keeps it) variance over all elements it
    sees, pooled in float64: batches count by their size, and what differs between batches counts
    too. ``num_batches_tracked`` becomes the number of batches behind them. The model computes as
    in training: one that is wholly in evaluation is set to ``train()`` for the pass.

    Frozen layers are left alone and normalise with what they have: those whose affine parameters
    require no gradient, and those in evaluation while their model is training. Everything else is
    as before afterwards, whatever is raised: training flags, momentum, other buffers, random
    number generators (torch's, numpy's, Python's, the loader's own).

    Args:
      model: on any device; batches are brought there.
      data: batches, iterated over once: tensors, tuples or lists (the first entry is the model's
        input), or mappings (the model's keyword arguments).
      forward: called as ``forward(model, batch)`` instead, for every other kind of batch.

    Raises:
      BatchNormError: no batches, a batch of one value per channel, layers that no batch reaches,
        or statistics with NaN or Inf. The statistics stay as they were.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2; the pooling: Chan, Golub & LeVeque 1983.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> update_bn(layer, [torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[7.0], [10.0]])])
    >>> layer.running_mean, layer.running_var
    (tensor([4.]), tensor([18.5000]))
    """
    if isinstance(data, (Tensor, Mapping, str)):
        raise TypeError(
            f"data must be an iterable of batches, got one {type(data).__name__}; "
            "put a single batch into a list"
        )
    if not any(_is_layer(module) for module in model.modules()):
        _say(f"{type(model).__name__} has no batch norm that keeps statistics: nothing to update.")
        return
    with preserved(model, data), _as_in_training(model) as layers:
        pools = {layer: _Pool(name) for name, layer in layers.items()}
        if pools:
            _pass(model, data, forward or _call, pools)
    if not layers:
        _say(f"every batch norm of {type(model).__name__} is frozen: nothing to update.")
        return
    missed = [pool.name for pool in pools.values() if not pool.count]
    if len(missed) == len(pools):
        raise BatchNormError(
            f"no batch reached any of the {len(pools)} batch-norm layers.",
            hint="if forward= was given, it must call the model it is handed.",
        )
    if spoilt := [pool.name for pool in pools.values() if not pool.is_finite()]:
        raise BatchNormError(
            f"the statistics of {', '.join(spoilt)} would hold NaN or Inf.",
            hint="look for them in the data and in the weights.",
        )
    for layer, pool in pools.items():
        if pool.count:
            pool.write_to(layer)
    if missed:
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
            layers = [module for module in self._model.modules() if _is_layer(module)]
            self._buffers = Buffers(layers, _STATISTICS)

    def __exit__(self, *raised: object) -> None:
        if self._buffers is not None:
            self._buffers.restore()


class _Pool:
    """The pooled statistics of what one layer has seen; float64, on the layer's device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.batches = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Takes in one input of the layer [batch, channels, ...]."""
        count = values.numel() // max(values.shape[1], 1)
        if count == 0:
            return
        # mps has no float64.
        wide = values.float() if values.device.type == "mps" else values.double()
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(wide, axes, correction=0)
        # Chan's form of E[var + mean^2] - mean^2, which cancels nothing.
        total = self.count + count
        apart = mean - self._mean
        self._mean = self._mean + apart * (count / total)
        self._squares = (
            self._squares + variance * count + apart.square() * (self.count * (count / total))
        )
        self.count = total
        self.batches += 1

    def is_finite(self) -> bool:
        """Whether the statistics hold neither NaN nor Inf."""
        if not self.count or self._mean.is_meta:  # the meta device holds no values to look at
            return True
        return bool((self._mean + self._squares).isfinite().all())

    def write_to(self, layer: _BatchNorm) -> None:
        """Makes the pooled statistics the layer's."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        with torch.no_grad():
            layer.running_mean.copy_(self._mean)
            layer.running_var.copy_(self._squares / max(self.count - 1, 1))
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(self.batches)


def _pass(
    model: torch.nn.Module,
    data: Iterable[Any],
    forward: Callable[[torch.nn.Module, Any], Any],
    pools: dict[_BatchNorm, _Pool],
) -> None:
    device = device_of(model)
    is_empty = True
    with torch.no_grad(), _observed(pools), _uncompiled():
        for batch in data:
            is_empty = False
            forward(model, _to(device, batch))
    if is_empty:
        raise BatchNormError(
            "there are no batches, so there are no statistics.",
            hint="pass the training data; an iterator that was read before is empty.",
        )


@contextmanager
def _as_in_training(model: torch.nn.Module) -> Iterator[dict[str, _BatchNorm]]:
    """Sets the flags for the pass; yields the layers to be updated by name.

    The flags are for ``preserved`` to restore.
    """
    was_training = any(module.training for module in model.modules())
    if not was_training:
        # The model's own train() knows which layers it keeps in evaluation, if it does.
        model.train()
    try:
        layers = {}
        for name, module in model.named_modules():
            if not _is_layer(module):
                continue
            if not module.training or _has_frozen_affine(module):
                module.training = False
            else:
                layers[name or type(module).__name__] = module
        yield layers
    finally:
        if not was_training:
            model.eval()


@contextmanager
def _observed(pools: dict[_BatchNorm, _Pool]) -> Iterator[None]:
    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else next(iter(kwargs.values()))
        pool = pools[layer]
        if values.numel() == values.shape[1] and not isinstance(layer, SyncBatchNorm):
            raise BatchNormError(
                f"batch {pool.batches + 1} has one value per channel at layer '{pool.name}', and "
                "no variance can be had from one value.",
                hint="use another batch size, or drop_last=True.",
            )
        pool.add(values.detach())

    handles = [layer.register_forward_pre_hook(observe, with_kwargs=True) for layer in pools]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> AbstractContextManager[Any]:
    # Compiled code does not call hooks that were added to it later.
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _is_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _has_frozen_affine(layer: torch.nn.Module) -> bool:
    affine = [*layer.parameters(recurse=False)]
    return bool(affine) and not any(parameter.requires_grad for parameter in affine)


def _to(device: torch.device | None, batch: Any) -> Any:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    return trees.map_with_path(
        lambda path, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch
    )


def _call(model: torch.nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"cannot tell the model's input in a batch of type {type(batch).__name__}; "
        "say how to call the model: forward=lambda model, batch: model(...)"
    )


def _say(message: str) -> None:
    warnings.warn(message, SWAWarning, stacklevel=3)
