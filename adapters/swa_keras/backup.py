"""Backups of a whole training in ``fit``, average included, from which it goes on.

Keras' ``BackupAndRestore`` writes weights and epoch one after the other over the old ones, so a
process that is killed meanwhile leaves weights of one epoch with the number of another, or half a
file; and it knows nothing of an average. Here each backup is a folder of its own that gets its name
when everything in it has reached the disk, and the one before is removed after that.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np

from swa_core import StateError, SWAError
from swa_core.atomic import flush_folder
from swa_keras import files, random_states

_NAME = re.compile(r"backup-(\d{8})")
_PARTIAL = ".partial-"
_WEIGHTS, _RANDOM = "model.weights.h5", "random.npz"
_AVERAGE, _TRAINING = "average.safetensors", "training.json"


class Backup(keras.callbacks.BackupAndRestore):
    """A ``BackupAndRestore`` that holds the average too; see ``SWA.backup``.

    Attributes:
      swa: the callback whose state is saved with the model's.
    """

    def __init__(
        self,
        swa: Any,
        backup_dir: str | os.PathLike[str],
        *,
        save_freq: str | int,
        delete_checkpoint: bool,
    ) -> None:
        super().__init__(os.fspath(backup_dir), save_freq, delete_checkpoint=delete_checkpoint)
        self.swa = swa
        self._folder = Path(self.backup_dir)
        self._epoch = 0
        self._batches = 0
        self._last_batch = -1

    def on_train_begin(self, logs: Any = None) -> None:
        """Goes on from the newest backup, if there is one."""
        self._batches = 0
        if not (found := self._backups()):
            return
        backup, model = found[-1], self.model
        if not model.built:
            raise SWAError(
                f"cannot go on from {backup}: the model is not built, so it has no weights yet.",
                hint="call the model on a batch of data before fit.",
            )
        training = _read_training(backup / _TRAINING)
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(backup / _WEIGHTS)
        with np.load(backup / _RANDOM) as arrays:
            random_states.load(model, arrays)
        self.swa.load_state_dict(files.read(backup / _AVERAGE)[1])
        # Where fit looks, after this hook, for the epoch to begin with.
        model._initial_epoch = training["epoch"]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras numbers the batches of each epoch from 0."""
        self._epoch = epoch
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves after so many batches, if that was asked for."""
        if self.save_freq == "epoch":
            return
        self._batches += batch - self._last_batch
        self._last_batch = batch
        if self._batches >= self.save_freq:
            self._batches = 0
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves at the end of the epoch, unless so many batches were asked for."""
        self.swa._catch_up(epoch_ended=True)
        self._epoch = epoch + 1
        self._last_batch = -1
        if self.save_freq == "epoch":
            self._save()

    def on_train_end(self, logs: Any = None) -> None:
        """Removes what it has written, unless told not to."""
        if self.delete_checkpoint:
            for backup in self._backups():  # the newest last
                _discard(backup)
            self._remove_partial()
            if self._folder.is_dir() and not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _save(self) -> None:
        model = self.model
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        old = self._backups()
        partial = self._folder / f"{_PARTIAL}{secrets.token_hex(4)}"
        partial.mkdir()
        model.save_weights(partial / _WEIGHTS)
        np.savez(partial / _RANDOM, **random_states.save(model))
        files.write(partial / _AVERAGE, self.swa.state_dict(), self.swa.config)
        (partial / _TRAINING).write_text(json.dumps({"version": 1, "epoch": self._epoch}))
        for name in (_WEIGHTS, _RANDOM, _TRAINING):
            with open(partial / name, "rb+") as file:
                os.fsync(file.fileno())
        flush_folder(partial)
        number = int(old[-1].name.removeprefix("backup-")) + 1 if old else 1
        os.replace(partial, self._folder / f"backup-{number:08d}")
        flush_folder(self._folder)
        for backup in old:
            _discard(backup)

    def _backups(self) -> list[Path]:
        """The whole ones, in the order in which they were written."""
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def _remove_partial(self) -> None:
        """What an interruption has left."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name.startswith(_PARTIAL):
                    shutil.rmtree(path)


def _discard(backup: Path) -> None:
    """Removes a backup, which is never seen half removed."""
    partial = backup.with_name(f"{_PARTIAL}{secrets.token_hex(4)}")
    os.replace(backup, partial)
    shutil.rmtree(partial)


def _read_training(path: Path) -> dict[str, Any]:
    try:
        training = json.loads(path.read_text())
        if training["version"] == 1 and isinstance(training["epoch"], int):
            return dict(training)
    except (ValueError, KeyError, TypeError):
        pass
    raise StateError(
        f"{path} is damaged, or of a newer version.",
        hint="remove the folder of this backup to begin anew.",
    )
