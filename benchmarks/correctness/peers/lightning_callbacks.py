"""Lightning: ``StochasticWeightAveraging`` and ``(EMA)WeightAveraging`` in a Trainer.

The loss is the product of the weights with those that the update leads to, and so its gradient,
which the optimizer assigns.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from correctness.cells import NotApplicableError
from correctness.peer import (
    Outcome,
    Peer,
    RaisedWhileSwappedError,
    Statistics,
    Swap,
    Tree,
)
from correctness.rules import DECAY, EMA_FROM_FIRST, UNIFORM, Rule
from correctness.scripts import Array, Intent, Script, batches
from correctness.torch_training import (
    Follow,
    fill,
    forward,
    statistics_of,
    targets,
    weights_of,
)

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """The model and its training; reads its weights where a validation begins and ends.

    Args:
      script: what happens; the Trainer's number of steps says where it is.
      raising: whether the validation raises.
    """

    def __init__(self, script: Script, *, raising: bool = False) -> None:
        super().__init__()
        self.script, self.raising = script, raising
        self.targets = targets(script)
        self.seen: dict[str, Tree] = {}
        fill(self, script)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x)

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        update = min(self.trainer.global_step + 1, self.script.updates)
        if self.script.counts is not None:
            self.count.fill_(self.script.counts[update])
        if self.script.batch_norm:
            self(x)
        target = self.targets[update]
        return sum((getattr(self, name) * value).sum() for name, value in target.items())

    def validation_step(self, x: torch.Tensor, index: int) -> None:
        self.seen["during"] = weights_of(self)
        if self.raising:
            raise RaisedWhileSwappedError

    def on_train_epoch_end(self) -> None:
        self.seen["after"] = weights_of(self)
        if self.script.batch_norm:
            self.seen["statistics"] = statistics_of(self)

    def configure_optimizers(self) -> Any:
        return Follow(self.parameters())


class TrainerPeer(Peer):
    """``Trainer.fit`` with one of the callbacks, which ends with the average in the module.

    Args:
      name: its row.
      rule: what the average should be.
      callback: makes the callback of a training.
      scheduled: makes it for an intent, None for who has no schedule.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        callback: Callable[[], Any],
        scheduled: Callable[[Intent], Any] | None = None,
    ) -> None:
        self.name, self.rule = name, rule
        self.callback, self.scheduled = callback, scheduled

    def updates_per_epoch(self, script: Script) -> int:
        """How many there are; all in one by default."""
        return script.updates

    def trainer(self, script: Script, callbacks: list[Any], **keywords: Any) -> Any:
        """A Trainer that keeps its hands off everything else."""
        return pl.Trainer(
            max_epochs=script.updates // self.updates_per_epoch(script),
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{"enable_checkpointing": False, **keywords},
        )

    def loader(self, script: Script) -> Any:
        """The batches of an epoch."""
        count = self.updates_per_epoch(script)
        inputs = batches(script) if script.batch_norm else [np.zeros((1, 1), np.float32)]
        return DataLoader(
            [torch.tensor(inputs[k % len(inputs)]) for k in range(count)], batch_size=None
        )

    def callback_for(self, intent: Intent | None) -> Any:
        """The callback of a training."""
        if intent is None:
            return self.callback()
        if self.scheduled is None:
            raise NotApplicableError("no schedule: should_update is the user's")
        return self.scheduled(intent)

    def visited(self, script: Script) -> Tree | None:
        """The snapshots by what the callback documents, initial weights first."""
        return None

    def outcome(self, module: Module) -> Outcome:
        """What is in the module after ``fit``."""
        script = module.script
        outcome = Outcome(
            weights_of(module),
            str(module.kernel.dtype).removeprefix("torch."),
            script.at(script.updates),
            self.visited(script),
        )
        if script.counts is not None:
            outcome.count = float(module.count)
        if script.tied:
            outcome.tied = module.tied is module.kernel
        return outcome

    def train(self, script: Script, intent: Intent | None = None) -> Outcome:
        module = Module(script)
        self.trainer(script, [self.callback_for(intent)]).fit(module, self.loader(script))
        return self.outcome(module)

    def checkpoint(self, folder: str, cut: int, script: Script) -> Any:
        """Saves after ``cut`` updates."""
        return ModelCheckpoint(folder, every_n_train_steps=cut, save_top_k=-1)

    def resumed(self, script: Script, cut: int) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            saving = self.checkpoint(folder, cut, script)
            first = self.trainer(script, [self.callback(), saving], enable_checkpointing=True)
            first.fit(Module(script), self.loader(script))
            (file,) = Path(folder).glob("*.ckpt")
            module = Module(script)
            trainer = self.trainer(script, [self.callback()])
            trainer.fit(module, self.loader(script), ckpt_path=file, weights_only=False)
        return self.outcome(module)

    def swapped(self, script: Script, *, raising: bool) -> Swap:
        module = Module(script, raising=raising)
        trainer = self.trainer(script, [self.callback()])
        try:
            trainer.fit(module, self.loader(script), DataLoader([torch.zeros(1)], batch_size=None))
        except RaisedWhileSwappedError:
            module.seen["after"] = weights_of(module)
        return Swap(script.at(script.updates), module.seen["during"], module.seen["after"])

    def batch_norm(self, script: Script, inputs: list[Array]) -> Statistics:
        module = Module(script)
        self.trainer(script, [self.callback()]).fit(module, self.loader(script))
        how = self.recompute(module, [torch.tensor(x) for x in inputs])
        training = module.seen["statistics"]
        return Statistics(weights_of(module), statistics_of(module), training, False, how)

    def recompute(self, module: Module, inputs: list[torch.Tensor]) -> str:
        """Recomputes batch norm as the documentation says, and by what; "" for not at all."""
        if not getattr(self.callback(), "_use_buffers", True):
            update_bn(inputs, module)
            return "update_bn"
        return ""

    def memory(self, script: Script) -> dict[str, bool]:
        module, callback = Module(script), self.callback()
        self.trainer(script, [callback]).fit(module, self.loader(script))
        live = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        kept = callback._average_model.parameters()
        return {"after fit": any(each.untyped_storage().data_ptr() in live for each in kept)}

    def renamed(self, script: Script) -> Outcome:
        raise NotApplicableError("the Trainer unwraps it")


class SWAPeer(TrainerPeer):
    """``StochasticWeightAveraging``: snapshots are taken where epochs begin, an update an epoch.

    So that its average can be compared with that of others, it starts at the second epoch, which
    begins at the weights of update 1; those of the last update are never in it. Which are is asked
    by another question.
    """

    def updates_per_epoch(self, script: Script) -> int:
        return 3 if script.batch_norm else 1

    def visited(self, script: Script) -> Tree | None:
        return {"kernel": script.kernel[:-1], "bias": script.bias[:-1]}

    def checkpoint(self, folder: str, cut: int, script: Script) -> Any:
        return ModelCheckpoint(folder, every_n_epochs=cut, save_top_k=-1)

    def recompute(self, module: Module, inputs: list[torch.Tensor]) -> str:
        return "an epoch more"  # that fit has appended

    def swapped(self, script: Script, *, raising: bool) -> Swap:
        raise NotApplicableError("validates the training weights")


def swa(start: int) -> StochasticWeightAveraging:
    """The callback; the learning rate it asks for has no effect on our optimizer."""
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=start, annealing_epochs=1)


def scheduled_ema(intent: Intent) -> EMAWeightAveraging:
    """The callback with the two numbers in the parameters that are called so."""
    return EMAWeightAveraging(
        decay=DECAY,
        update_starting_at_step=intent.start,
        update_every_n_steps=intent.every,
    )


PEERS = [
    SWAPeer(
        "Lightning StochasticWeightAveraging",
        UNIFORM,
        lambda: swa(2),
        lambda intent: swa(intent.start),
    ),
    TrainerPeer("Lightning WeightAveraging", UNIFORM, WeightAveraging),
    TrainerPeer(
        "Lightning WeightAveraging, use_buffers=False",
        UNIFORM,
        lambda: WeightAveraging(use_buffers=False),
    ),
    TrainerPeer(
        "Lightning EMAWeightAveraging",
        EMA_FROM_FIRST,
        lambda: EMAWeightAveraging(decay=DECAY),
        scheduled_ema,
    ),
]
