"""Checkpoints that hold the averaged weights."""

from __future__ import annotations

import os
import warnings
from typing import Any

import keras

from swa_core import ConfigError, SWAWarning
from swa_core.errors import Fault


class AveragedCheckpoint(keras.callbacks.ModelCheckpoint):
    """A ``ModelCheckpoint`` that saves the model with the average in it; see ``SWA.checkpoint``.

    Attributes:
      swa: the callback whose average is saved.
    """

    def __init__(
        self,
        swa: Any,
        filepath: str | os.PathLike[str],
        monitor: str | None,
        *,
        update_bn: bool,
        **arguments: Any,
    ) -> None:
        prefix = swa._metrics_prefix
        if monitor is None:
            monitor = f"{prefix or 'val_'}loss"
        if arguments.get("save_best_only") and (fault := _fault(monitor, swa)):
            raise ConfigError([Fault("monitor", fault)], source="swa.checkpoint(...)")
        super().__init__(filepath, monitor, **arguments)
        self.swa = swa
        self._update_bn = update_bn
        self._saved = False
        self._skipped: str | None = None
        self._told_of_missing = False

    @property
    def model(self) -> Any:
        """The model; what is saved of it is the average."""
        model = super().model
        return model if model is None else _Averaged(model, self)

    def on_train_begin(self, logs: Any = None) -> None:
        """Nothing is saved yet in this training."""
        super().on_train_begin(logs)
        self._saved, self._skipped = False, None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves after so many batches, if that was asked for."""
        if self.save_freq != "epoch" and self.monitor_op is None and self.save_best_only:
            self._set_monitor_op()
        super().on_train_batch_end(batch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Warns if nothing at all was saved."""
        super().on_train_end(logs)
        if not self._saved and self._skipped is not None:
            warnings.warn(
                f"swa.checkpoint: nothing was saved to {self.filepath} in this training, because "
                f"{self._skipped}.",
                SWAWarning,
                stacklevel=2,
            )

    def _set_monitor_op(self) -> None:
        """Whether more or less is better: of ``val_swa_auc`` what Keras finds for ``val_auc``."""
        monitor, prefix = self.monitor, self.swa._metrics_prefix
        if prefix and monitor.startswith(prefix):
            self.monitor = f"val_{monitor.removeprefix(prefix)}"
        try:
            super()._set_monitor_op()
        except ValueError:
            if self.save_best_only:
                raise  # else nothing is compared
        finally:
            self.monitor = monitor

    def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
        self.swa._catch_up(epoch_ended=batch is None)
        skipped = self._why_not(epoch, logs or {})
        if skipped is None:
            super()._save_model(epoch, batch, logs)
            return
        self._skipped = skipped
        if self.verbose > 0:
            print(f"\nEpoch {epoch + 1}: not saving an average: {skipped}")

    def _why_not(self, epoch: int, logs: dict[str, Any]) -> str | None:
        """Why there is nothing to save now, or None."""
        if not self.swa.n_averaged:
            return "there is no snapshot yet"
        if not self.save_best_only or self.monitor in logs:
            return None
        if self.monitor.startswith("val_") and not any(name.startswith("val_") for name in logs):
            # Keras would save here, and so overwrite the best by one that nobody has compared.
            self._tell_of_missing(epoch)
            return f"the epoch was not validated, so {self.monitor} is not known"
        return None

    def _tell_of_missing(self, epoch: int) -> None:
        if not self._told_of_missing:
            self._told_of_missing = True
            warnings.warn(
                f"swa.checkpoint: epoch {epoch + 1} was not validated, so its average is compared "
                f"with no other by {self.monitor}, and not saved. Epochs like it are left out.",
                SWAWarning,
                stacklevel=2,
            )


class _Averaged:
    """A model that is saved with the average in it, and is otherwise itself."""

    def __init__(self, model: Any, checkpoint: AveragedCheckpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def save(self, *args: Any, **kwargs: Any) -> None:
        self._save(self._model.save, *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        self._save(self._model.save_weights, *args, **kwargs)

    def _save(self, save: Any, *args: Any, **kwargs: Any) -> None:
        checkpoint = self._checkpoint
        with checkpoint.swa._lent(self._model, update_bn=checkpoint._update_bn):
            save(*args, **kwargs)
        checkpoint._saved = True


def _fault(monitor: str, swa: Any) -> str | None:
    """Why a metric is not one of the average, or None."""
    if swa._validate == "raw" and monitor.startswith("val_"):
        return (
            f'{monitor} is not of the average with validate="raw". Pass SWA(..., validate="both").'
        )
    name = f"val_{swa._name}_"
    if swa._validate == "average" and monitor.startswith(name):
        plain = f"val_{monitor.removeprefix(name)}"
        return (
            f'{monitor} is not logged with validate="average", where {plain} is the average\'s. '
            f"Say monitor={plain!r}."
        )
    return None
