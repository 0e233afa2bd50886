"""Which batch-norm layers a pass updates, and what reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from swa_core.errors import BatchNormError
from swa_torch.pooling import Pool


def keeps_statistics(module: torch.nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics.

    >>> keeps_statistics(torch.nn.BatchNorm1d(1)), keeps_statistics(torch.nn.InstanceNorm1d(1))
    (True, False)
    """
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def as_in_training(model: torch.nn.Module) -> Iterator[dict[str, _BatchNorm]]:
    """Sets the training flags for a pass; yields the layers to be updated, by name.

    Layers that are not to be updated are put in evaluation. The flags are for ``preserved`` to
    restore.

    Raises:
      BatchNormError: a layer to be updated is scripted or traced.
    """
    was_training = any(module.training for module in model.modules())
    if not was_training:
        # The model's own train() knows which layers it keeps in evaluation, if it does.
        model.train()
    try:
        layers = {}
        for name, module in model.named_modules():
            is_scripted = _is_scripted_layer(module)
            if not keeps_statistics(module) and not is_scripted:
                continue
            if not module.training or _has_frozen_affine(module):
                if module.training:
                    module.training = False
            elif is_scripted:
                raise BatchNormError(
                    f"layer '{name or type(module).__name__}' is scripted or traced, and what "
                    "reaches it cannot be seen.",
                    hint="update the model before torch.jit.script, or freeze the layer.",
                )
            else:
                layers[name or type(module).__name__] = module
        yield layers
    finally:
        if not was_training:
            model.eval()


@contextmanager
def observed(pools: dict[_BatchNorm, Pool]) -> Iterator[None]:
    """Within the block, what reaches each layer goes into its pool."""
    undo: list[Callable[[], None]] = []
    try:
        for layer, pool in pools.items():
            if layer.momentum is None:
                # The cumulative average reads its count back from the device, at every batch.
                layer.momentum = 0.1
                undo.append(lambda layer=layer: setattr(layer, "momentum", None))
            observe = _observe_input if _has_torchs_forward(layer) else _observe_arithmetic
            undo.append(observe(layer, pool))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _observe_input(layer: _BatchNorm, pool: Pool) -> Callable[[], None]:
    """What torch's own forward is called with is what it normalises."""

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = _first(args, kwargs)
        if values.dim() > 1:  # else the layer itself says what is wrong
            _add(layer, pool, values)

    return layer.register_forward_pre_hook(observe, with_kwargs=True).remove


def _observe_arithmetic(layer: _BatchNorm, pool: Pool) -> Callable[[], None]:
    """A forward of its own may mask, split or permute its input first: watch what it computes."""
    forward, own = layer.forward, layer.__dict__.get("forward")

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Arithmetic(layer, pool) as arithmetic:
            result = forward(*args, **kwargs)
        if not arithmetic.was_seen:
            # It does without F.batch_norm. What else than its input should it normalise?
            _add(layer, pool, _first(args, kwargs))
        return result

    def restore() -> None:
        if own is None:
            del layer.forward
        else:
            layer.forward = own

    layer.forward = watched  # type: ignore[method-assign]
    return restore


class _Arithmetic(TorchFunctionMode):
    """Watches for calls of F.batch_norm with the statistics of one layer."""

    def __init__(self, layer: _BatchNorm, pool: Pool) -> None:
        super().__init__()
        self._layer, self._pool = layer, pool
        self.was_seen = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.batch_norm:
            self._look_at(*args, **(kwargs or {}))
        elif function is torch.batch_norm:
            self._look_at_inner(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _look_at(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        if running_mean is not self._layer.running_mean:
            return  # that of a layer inside this one
        self.was_seen = True
        if training:
            _add(self._layer, self._pool, input)
        else:
            self._pool.is_fixed = True

    def _look_at_inner(
        self, input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any
    ) -> None:
        self._look_at(input, mean, var, training=training)


def _add(layer: _BatchNorm, pool: Pool, values: Tensor) -> None:
    if values.dim() < 2 or values.shape[1] != layer.num_features:
        raise BatchNormError(
            f"batch {pool.batches + 1} reaches layer '{pool.name}' with shape "
            f"{tuple(values.shape)}, and the layer has {layer.num_features} channels.",
            hint="its input must be [batch, channels, ...].",
        )
    if values.numel() == values.shape[1]:
        raise BatchNormError(
            f"batch {pool.batches + 1} has one value per channel at layer '{pool.name}', and "
            "no variance can be had from one value.",
            hint="use another batch size, or drop_last=True.",
        )
    pool.add(values)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _has_torchs_forward(layer: _BatchNorm) -> bool:
    forward = type(layer).forward
    return "forward" not in layer.__dict__ and forward in (
        _BatchNorm.forward,
        SyncBatchNorm.forward,
    )


def _has_frozen_affine(layer: torch.nn.Module) -> bool:
    affine = [*layer.parameters(recurse=False)]
    return bool(affine) and not any(parameter.requires_grad for parameter in affine)


def _is_scripted_layer(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, torch.jit.ScriptModule)
        and "BatchNorm" in str(getattr(module, "original_name", ""))
        and any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
    )
