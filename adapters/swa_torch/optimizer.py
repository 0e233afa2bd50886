"""An optimizer that wraps an optimizer and averages what it trains."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swa_core import Schedule, SWAConfig
from swa_core.errors import ConfigError, Fault, StructureError, SWAWarning
from swa_torch import files
from swa_torch.batch_norm import Statistics, update_bn
from swa_torch.checkpointing import caller
from swa_torch.forwarding import Forwarding
from swa_torch.full_state import full_state_dict
from swa_torch.home import Home
from swa_torch.running_average import RunningAverage
from swa_torch.sharding import local
from swa_torch.state import pack, unpack


class SWA(Forwarding):
    """Stochastic weight averaging around any ``torch.optim.Optimizer``; the loop does not change.

    Groups, state and defaults are those of the wrapped optimizer, so schedulers, gradient scalers
    and whatever else takes an optimizer takes this one. Updates are counted at the wrapped
    optimizer, whoever steps it. Its hooks are where the ``register_*`` methods put theirs: they
    fire once and are handed the wrapped optimizer.

    A snapshot is of the weights as the wrapped ``step`` leaves them. Of a schedule-free optimizer
    these are the ones that gradients are taken at, and its ``train()`` and ``eval()`` are reached
    through this one.

    Several of these may be around one optimizer, each with an average of its own; one for each
    optimizer where a model has several.

    Trainable floating-point and complex parameters are averaged, in float32 or wider; frozen ones
    are left alone, and one that is unfrozen later (or a group that is added later) joins with its
    own count. A parameter that has joined stays, also if it is frozen then.

    Weights may be replicated (``DistributedDataParallel``) or sharded (``fully_shard``, tensor
    parallelism): a rank averages what it holds of them. Whether a snapshot is finite all ranks
    decide together if weights are sharded, by one scalar all-reduce for each dimension of the mesh
    that they are sharded over; nothing else is sent. For sharded weights ``averaged()`` and
    ``finalize()`` need the model. What DeepSpeed's ZeRO stage 3 and
    FullyShardedDataParallel, the forerunner of ``fully_shard``, leave of parameters is refused.

    Args:
      optimizer: the optimizer that trains. It stays usable as it is.
      config: what to average: a ``SWAConfig``, a mapping, or the path of a file.
      steps_per_epoch: updates per epoch: ``len(loader) // accumulation``.
      total_steps: updates in all: ``epochs * steps_per_epoch``.
      device: where the averages live: None for each beside its parameter, or ``"cpu"``. Then
        weights on an accelerator are copied to the host at a snapshot (on CUDA by a stream of its
        own, into one pinned copy of the model's size, whose allocator rounds up to a power of two)
        and averaged there in a thread while training goes on. The next snapshot, and whatever
        reads the average, waits for that; what fails there is raised then. The average takes no
        memory of the device, also not while it stands in for the weights.
      dtype: what averages are kept in at least: ``torch.float32`` (by default) or
        ``torch.float64``, also by name; those of wider weights are as wide as these. Float64
        averages of float32 weights take twice the memory of the weights, and once more while they
        stand in for them. A saved average of the weights' own width is widened when it is loaded;
        a wider one than this is refused, because it would lose what it holds.

    Raises:
      ConfigError: the configuration has faults or needs a length that was not given.
      ValueError: another ``device`` or ``dtype``.
      StructureError: the optimizer has no parameters, or none that can be averaged where they are.
      TypeError: ``optimizer`` is none (a class of them, say), is an ``SWA`` already, or is one that
        Accelerate has prepared, whose ``step`` may do nothing without telling.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SWA(torch.optim.SGD([weight], lr=1.0), {"start": "2step", "every": "2step"})
    >>> for _ in range(4):
    ...     weight.grad = torch.tensor([-1.0, 1.0])
    ...     optimizer.step()
    >>> weight.tolist(), optimizer.averaged_parameters[0].tolist(), optimizer.n_averaged
    ([4.0, -4.0], [3.0, -3.0], 2)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        home = Home.of(device, dtype)
        config = SWAConfig.of(config)
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        schedule = config.schedule(**lengths)
        lr = config.lr_schedule(**lengths)
        if not any(group["params"] for group in optimizer.param_groups):
            raise StructureError(
                "the optimizer has no parameters, so there is nothing to average.",
                hint="pass it model.parameters(), and a fresh call of it: generators run dry.",
            )
        if lr is not None and not all("lr" in group for group in optimizer.param_groups):
            fault = Fault("swa.lr", f"{type(optimizer).__name__} has no learning rate to set.")
            raise ConfigError([fault], source="the configuration")
        super().__init__(optimizer)
        self.config = config
        self._average = RunningAverage(optimizer, config, schedule, lr, home)
        self._average.connect(self)

    # Training.

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One update of the wrapped optimizer; a snapshot joins the average if it is due.

        Whatever the wrapped step raises (a closure's error, say) comes out as it is; the update is
        not counted then.

        Args:
          closure: reevaluates the model and returns the loss, for optimizers that ask for one.
          kwargs: what the wrapped optimizer's ``step`` takes besides, if it does.

        Raises:
          SwappedError: inside ``averaged()``.
          StructureError: a snapshot is due, and parameters changed in number, shape or dtype. The
            update was made and is counted; the average stays as it was.
        """
        if closure is not None:
            return self.optimizer.step(closure, **kwargs)
        # Passing on nothing by ** would cost as much as the count does.
        return self.optimizer.step(**kwargs) if kwargs else self.optimizer.step()

    # The wrapped step calls the hooks already; torch would put them around this one again.
    step.hooked = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # Schedule-free optimizers turn one kind of weights into another by these.
        return functools.partial(self._with_live, found) if name in ("train", "eval") else found

    def _with_live(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method that works on the live weights, inside ``averaged()`` too."""
        average = self._average
        if average.swap is None:
            return method(*args, **kwargs)
        average.swap_out()
        try:
            return method(*args, **kwargs)
        finally:
            average.swap_in("averaged()")

    # The average.

    @property
    def schedule(self) -> Schedule:
        """Which updates are snapshots."""
        return self._average.schedule

    @property
    def updates(self) -> int:
        """Completed updates."""
        return self._average.updates

    @property
    def n_averaged(self) -> int:
        """Snapshots in the average. A group that was added later has fewer."""
        self._average.settle()
        return self._average.n_averaged

    @property
    def n_skipped(self) -> int:
        """Snapshots left out because they held NaN or Inf."""
        self._average.settle()
        return self._average.n_skipped

    @property
    def averaged_parameters(self) -> list[Tensor]:
        """Copies of the averages, one for each parameter in the order of the groups.

        What is not averaged (frozen parameters; all of them before the first snapshot, with a
        warning said once) is a copy of the live weights.

        Raises:
          SwappedError: before the first snapshot, while the average of another ``SWA`` stands in
            for the live weights.
        """
        if not self.n_averaged:
            self._average.refuse_another("averaged_parameters")
        self._average.warn_if_empty(stacklevel=2)
        return self._average.read()

    def averaged_state_dict(
        self, model: torch.nn.Module, *, cpu_offload: bool = False
    ) -> dict[str, Any]:
        """The state dict of the model with averaged weights, to save or to load elsewhere.

        The weights keep their dtypes; frozen weights and all buffers are the live model's (so run
        ``update_bn`` inside ``averaged()`` first, and call this there, if there is batch norm). The
        names are those of the plain model, whatever DistributedDataParallel, ``torch.compile`` or
        activation checkpointing wrap around it, and sharded weights are gathered: then all ranks
        have to call this. Training is not disturbed. Before the first snapshot the live weights
        are given, and a warning says so once.

        Args:
          model: the model that this optimizer trains, wrapped or not.
          cpu_offload: leave the result in the host's memory, and on the first rank alone; the
            others get an empty dictionary.

        Returns:
          Tensors in memory of their own, by name, tied weights under each of their names.

        Raises:
          StructureError: the averages are of another model.
          SwappedError: before the first snapshot, while the average of another ``SWA`` stands in
            for the live weights.

        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters())
        >>> optimizer = SWA(sgd, {"start": "1step", "every": "1step"})
        >>> optimizer.step()
        >>> {name: tensor.shape for name, tensor in optimizer.averaged_state_dict(model).items()}
        {'weight': torch.Size([1, 1]), 'bias': torch.Size([1])}
        """
        if not self.n_averaged:
            self._average.refuse_another("averaged_state_dict()")
        self._average.warn_if_empty(stacklevel=2)
        if self._average.swap is None:
            self._average.join("averaged_state_dict()")
        self._average.drop_whole_copies(model, "averaged_state_dict()")
        return full_state_dict(model, self._average.by_identity(), cpu_offload=cpu_offload)

    @contextmanager
    def averaged(
        self, model: torch.nn.Module | None = None, bn_data: Iterable[Any] | None = None
    ) -> Iterator[None]:
        """A block in which the model computes with the averaged weights.

        The weights change by value, in their own memory. At the end of the block the live weights
        and batch-norm statistics return, whatever is raised inside. Before the first snapshot the
        live weights stay in place, and a warning says so once.

        Float32 weights and averages change places without a further copy, so what is written to
        the weights inside the block would be written to the average; a warning says so (of what
        torch counts: writing to ``parameter.data`` it does not).
        ``train()`` and ``eval()`` of a schedule-free optimizer, which rewrite the weights, reach
        the live ones inside the block too.

        Args:
          model: the model, needed with ``bn_data`` and for sharded weights.
          bn_data: batches for ``update_bn``, to recompute the batch-norm statistics.

        Raises:
          SwappedError: inside another ``averaged()`` block, also one of another ``SWA`` around the
            same optimizer.
          StructureError: parameters changed in number, shape or dtype.
          BatchNormError: as ``update_bn``; everything is restored.
        """
        statistics = self._check_bn(model, bn_data)
        average = self._average
        average.refuse_swapped("averaged()")
        average.warn_if_empty(stacklevel=3)
        average.drop_whole_copies(model, "averaged()")
        try:
            average.swap_in("averaged()")
            with statistics:
                if model is not None and bn_data is not None:
                    update_bn(model, bn_data)
                yield
        finally:
            if average.swap is not None:
                average.swap_out()
            average.drop_whole_copies(model, "averaged()")

    def finalize(
        self, model: torch.nn.Module | None = None, bn_data: Iterable[Any] | None = None
    ) -> None:
        """Makes the average the weights for good. Training may go on from there.

        A schedule-free optimizer keeps other weights besides, from which its ``eval()`` would
        compute its own again: do not call it afterwards.

        Args:
          model: the model, needed with ``bn_data`` and for sharded weights.
          bn_data: batches for ``update_bn``, to recompute the batch-norm statistics.

        Raises:
          NothingAveragedError: before the first snapshot.
          SwappedError: inside ``averaged()``.
          StructureError: parameters changed in number, shape or dtype.
          BatchNormError: as ``update_bn``. After any error the weights are the live ones.
        """
        self._check_bn(model, bn_data)
        average = self._average
        average.refuse_swapped("finalize()")
        average.refuse_empty("finalize()")
        average.drop_whole_copies(model, "finalize()")
        average.swap_in("finalize()")
        try:
            if model is not None and bn_data is not None:
                update_bn(model, bn_data)
        except BaseException:
            average.swap_out()
            average.drop_whole_copies(model, "finalize()")
            raise
        average.swap_out(keep=True)

    @staticmethod
    def _check_bn(model: torch.nn.Module | None, bn_data: Iterable[Any] | None) -> Statistics:
        if bn_data is not None and model is None:
            raise TypeError("bn_data needs the model whose batch norm it is for: model=...")
        return Statistics(None if bn_data is None else model)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state with the average in it; a plain optimizer loads it too.

        Saved inside ``averaged()``, it holds the live weights besides, because the model's own
        state then holds the averaged ones. (Batch-norm statistics are the model's alone: save
        outside the block if ``bn_data`` was given.) As torch's own, it is for writing to a file:
        its tensors may go on changing with the training, so deep-copy it to keep it in memory.

        ``torch.distributed.checkpoint`` saves it and loads it again on any number of ranks, by
        ``get_optimizer_state_dict`` and ``set_optimizer_state_dict``, for which averages are
        sharded as their parameters are. There it cannot be saved inside ``averaged()``, and a
        plain optimizer's checkpoint is loaded with ``allow_partial_load=True``.

        Raises:
          SwappedError: inside the ``averaged()`` block of another ``SWA``; inside any, for
            ``torch.distributed.checkpoint``.
          StructureError: parameters changed in number, shape or dtype.
        """
        self._average.refuse_another("state_dict()")
        if self._average.swap is None:
            self._average.join("state_dict()")
        # The core's, not self.optimizer: in Lightning's subclass of this one that is a wrapper too.
        plain = self._average.optimizer.state_dict()
        return pack(plain, self._average, caller())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state, bit for bit. Load the model first.

        A state saved inside ``averaged()`` puts the live weights back into the parameters. The
        state of a plain optimizer is taken with a warning: the average starts anew.

        Args:
          state_dict: what ``state_dict()`` returned.

        Raises:
          StateError: truncated, damaged, newer, or of another schedule or rule.
          StructureError: of other parameters.
          SwappedError: inside ``averaged()``.
        """
        average = self._average
        average.refuse_swapped("load_state_dict()")
        loaded = unpack(state_dict, average)
        average.optimizer.load_state_dict(loaded.plain)
        if loaded.counters is None:
            average.reset()
            warnings.warn(
                "this state holds no average (a plain optimizer saved it?): the average starts "
                "anew, at update 0.",
                SWAWarning,
                stacklevel=2,
            )
            return
        average.restore(loaded.counters, loaded.cohorts)
        if average.rates is not None:
            average.rates.load(loaded.base_rates)
        with torch.no_grad():
            found = dict(average.positions())
            for position, weights in loaded.live.items():
                local(found[position]).copy_(weights)

    def save_average(self, path: str | os.PathLike[str], model: torch.nn.Module) -> None:
        """Writes the average, its configuration and its counters into one safetensors file.

        The file outlives this framework: ``swa_core.load_average`` reads it in any, and every
        reader of safetensors finds the averages under the names of the parameters. To resume this
        very training, ``state_dict`` is enough. Training is not disturbed.

        Args:
          path: the file, by custom ``*.safetensors``; replaced if it is there. If weights are
            sharded, all ranks have to call this, and the first one writes.
          model: whose names the parameters get, wrapped or not.

        Raises:
          StructureError: an average is of no parameter of this model.
          OSError: the file cannot be written; an older one is still there.

        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/average.safetensors"
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters())
        >>> optimizer = SWA(sgd, {"start": "1step", "every": "1step"})
        >>> optimizer.step()
        >>> optimizer.save_average(file, model)
        >>> optimizer.load_average(file, model)
        >>> optimizer.n_averaged
        1
        """
        self._average.refuse_another("save_average()")
        if self._average.swap is None:
            self._average.join("save_average()")
        files.save(path, model, self._average, self.config)

    def load_average(
        self,
        path: str | os.PathLike[str],
        model: torch.nn.Module,
        *,
        names: Mapping[str, str] | None = None,
        transform: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        """Goes on from the average in a file, which any framework may have saved.

        The model's weights and the wrapped optimizer's own state are loaded as always, and before.

        Args:
          path: the file.
          model: that this optimizer trains, wrapped or not.
          names: for every averaged parameter of the model, by name, the name in the file; by
            default they are the same.
          transform: for parameters that lie otherwise in the file, by name, a function that makes
            the one numpy array out of the other (``numpy.transpose`` for a dense kernel of Keras
            or JAX).

        Raises:
          StateError: no saved average, damaged, newer, or of another schedule or rule.
          StructureError: of other parameters. After any error nothing has changed.
          SwappedError: inside ``averaged()``.
        """
        self._average.refuse_swapped("load_average()")
        files.load(path, model, self._average, names=names, transform=transform)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle. The instance's step, which schedulers put there, stays out.
        self._average.refuse_swapped("copying or pickling this optimizer")
        return {
            "optimizer": self.optimizer,
            "config": self.config,
            "_average": self._average,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._average.connect(self)


def _check_optimizer(optimizer: Any) -> None:
    """Raises ``TypeError`` for what cannot be wrapped."""
    if isinstance(optimizer, SWA):
        raise TypeError(
            "this optimizer is wrapped in an SWA already; for another average wrap its inner one, "
            "optimizer.optimizer, once more"
        )
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__
        raise TypeError(
            f"expected an optimizer to wrap, got the class {name}; make one first: "
            f"{name}(model.parameters(), ...)"
        )
    if hasattr(type(optimizer), "step_was_skipped"):
        # Its step() is called for every batch and does nothing while gradients accumulate.
        raise TypeError(
            f"this {type(optimizer).__name__} skips updates without telling; wrap the optimizer "
            "before accelerator.prepare() gets it"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}; if it "
            "wraps one, wrap that one"
        )
