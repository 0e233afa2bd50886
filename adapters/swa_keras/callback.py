"""The callback: stochastic weight averaging in ``model.fit``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from swa_core import ConfigError, SWAConfig, SWAWarning
from swa_core.errors import Fault
from swa_keras import checking
from swa_keras.averages import refuse_nothing
from swa_keras.averaging import Averaging
from swa_keras.backup import Backup
from swa_keras.batches import fault_of
from swa_keras.caveats import Caveats
from swa_keras.checkpoint import AveragedCheckpoint
from swa_keras.lending import usable
from swa_keras.model_state import averaged_variables, synced
from swa_keras.validation import Validation

Validate = Literal["both", "average", "raw"]


class SWA(Averaging):
    """Averages the weights of a model along its training.

    Add it to ``fit`` on the tensorflow, jax or torch backend. How long the training is comes from
    Keras. Snapshots are taken after the scheduled optimizer updates (with gradient accumulation
    the completed ones, with loss scaling those that were not left out), the training itself is
    not changed, and ``fit`` ends with the averaged weights in the model.

    Where Keras does not know the number of steps per epoch, times in epochs and percentages are
    counted at the ends of epochs. Several calls of ``fit`` with one callback go on counting, by
    the schedule of the first; ``initial_epoch`` counts as epochs done. A ``fit`` that an error
    ended counts as far as it came. Whoever loads a checkpoint between two epochs, or weights at
    any time, does not turn the clock back: the next snapshot is of the weights that are there.

    Batch norm: the running statistics belong to the training weights. With ``bn_data`` they are
    recomputed for the average, which costs one forward pass over ``bn_data`` for every validation
    on a changed average and for the final weights. ``bn_validate=False`` saves those for
    validation, which then sees the average with the statistics of the training weights, as it is
    without ``bn_data``: often much worse, so a warning tells of missing data.

    Args:
      config: a ``SWAConfig``, a mapping of its fields, or the path of a file with ``[swa]``.
        Without one, the average is that of the model's ``SWAOptimizer``, which takes the
        snapshots by itself; this callback then validates on it and ends the training on it.
      bn_data: training data for the batch-norm statistics, in any form that ``update_bn`` takes
        and that can be read more than once (of a generator: the function that makes it). A
        tf.data.Dataset that shuffles gives a training on the same object another order.
      validate: what ``fit`` validates: "both" logs the training weights as ``val_*`` and the
        average as ``val_swa_*`` (equal to ``val_*`` before the first snapshot), reading the
        validation data twice (to monitor them, tell the callback which way is better:
        ``EarlyStopping("val_swa_loss", mode="min")``); "average" logs the average as ``val_*``;
        "raw" leaves validation alone.
      bn_validate: whether validation on the average recomputes batch norm with ``bn_data``. What
        ``fit`` ends with, ``averaged``, ``finalize`` and ``checkpoint`` do so in any case.
      finalize: whether ``fit`` ends with the average in the model. If False, use ``averaged`` and
        ``finalize``.
      name: what the average is called in the logs: with "ema" they are ``val_ema_*``. Several
        callbacks on one model are independent of each other, and each needs a name of its own;
        the model ends on the average of the last that finalizes.

    Raises:
      ConfigError: everything wrong with the configuration; later, at the start of ``fit``, times
        that cannot be resolved or snapshots inside an execution of several steps.
      SWAError: later, an optimizer whose updates cannot be counted, or the callback listed twice.
      StructureError: later, a model that has changed, or another one.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1.

    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> swa = SWA({"start": "50%", "every": "1ep"})
    >>> x, y = np.ones((8, 2)), np.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=2, epochs=4, callbacks=[swa], verbose=0)
    >>> swa.schedule, swa.n_averaged
    (Schedule(start=8, every=4, stop=None), 3)
    """

    def __init__(
        self,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        bn_data: Any = None,
        validate: Validate = "both",
        bn_validate: bool = True,
        finalize: bool = True,
        name: str = "swa",
    ) -> None:
        caveats = Caveats(
            recomputes=bn_data is not None, uses_average=finalize or validate != "raw"
        )
        super().__init__(config, bn_data, caveats)
        if faults := _faults(bn_data, validate, name):
            raise ConfigError(faults, source="SWA(...)")
        self._validate = validate
        self._name = name
        self._bn_validate = bn_validate
        self._finalize_at_end = finalize
        self._validation: Validation | None = None
        self._unbuilt = False
        self._expects = True
        self._warned_none = False
        # What was said about lists of callbacks.
        self._noticed: set[str] = set()

    # The hooks of fit

    def on_train_begin(self, logs: Any = None) -> None:
        """Resolves the schedule, and refuses what cannot work."""
        self._lender.refuse_swapped("train")
        self._remove_validation()
        model = self.model
        self._refuse_other(model, "cannot train")
        self._check(model)
        self._settle(model)
        checking.watch(self, SWA)
        self._progress.begin_fit(model, self.params or {})
        self._caveats.say(model)
        if model.built:
            refuse_nothing(averaged_variables(model), "cannot train with averaging")
            self._average.match(averaged_variables(model), "cannot go on averaging")
        self._unbuilt = not model.built
        if self._validate != "raw":
            self._validation = Validation(
                model,
                self,
                both=self._validate == "both",
                name=self._name,
                averaged=self._context_for_validation,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts counting with the first epoch of a ``fit``."""
        begins = not self._progress.in_fit
        if begins:
            self._load_into(self.model)
        self._progress.begin_epoch(lambda: self.model, self.params or {}, epoch)
        if begins:
            self._expects = self._expects_average()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the learning rate of ``[swa.lr]``."""
        self._progress.prepare_batch(lambda: self.model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Takes the snapshot if one is due; otherwise only counts."""
        if self._unbuilt:
            self._unbuilt = False
            refuse_nothing(averaged_variables(self.model), "cannot train with averaging")
        if self._progress.batch_end(batch):
            self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Takes the snapshot of a training whose clock ticks in epochs."""
        self._end_epoch()

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the average in the model, if asked to."""
        self._remove_validation()
        self._progress.end_fit()
        if not self._finalize_at_end:
            return
        if self.n_averaged:
            self.finalize()
        elif self._expects and self.schedule is not None:
            skipped = f" ({self.n_skipped} held NaN or Inf)" if self.n_skipped else ""
            warnings.warn(
                f"SWA: no snapshot was averaged in {self.updates} updates{skipped}; the model "
                f"keeps its training weights. The schedule is {self.schedule}.",
                SWAWarning,
                stacklevel=2,
            )

    # In the list of callbacks

    @staticmethod
    def check(callbacks: Any) -> Any:
        """Warns where other callbacks, or their order, would undo the average.

        ``fit`` makes the same checks when it begins; this one is made before anything is loaded,
        and of any list. It tells of callbacks that restore other weights at the end
        (``EarlyStopping(restore_best_weights=True)`` listed after this one), save the training
        weights by a metric of the average, wait for a metric that is not logged or that Keras
        cannot judge, back up without the average, and of two averages in each other's way.

        Args:
          callbacks: as for ``fit``.

        Returns:
          The same, so that it can be written in place.

        Raises:
          SWAError: ``SwapEMAWeights`` is among them.

        >>> import keras
        >>> import warnings
        >>> best = keras.callbacks.EarlyStopping(restore_best_weights=True)
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     callbacks = SWA.check([SWA({}), best])
        >>> print(str(caught[0].message)[:65])
        SWA: EarlyStopping(restore_best_weights=True) is listed after SWA
        """
        checking.check(callbacks, SWA)
        return callbacks

    def checkpoint(
        self,
        filepath: str | os.PathLike[str],
        monitor: str | None = None,
        *,
        update_bn: bool = True,
        **arguments: Any,
    ) -> AveragedCheckpoint:
        """A callback for ``fit`` that saves the model with the average in it.

        It is a ``keras.callbacks.ModelCheckpoint`` and takes its arguments; the file loads
        anywhere, without this package (with a ``SWAOptimizer`` or ``SWASchedule`` in the model by
        ``load_model(..., compile=False)``). It may stand before or after this callback. While
        there is no snapshot it saves nothing and, with ``verbose=1``, says so; a training in which
        nothing was saved ends with a warning. With ``save_best_only``, epochs that are not
        validated (``validation_freq``) are left out.

        Args:
          filepath: ``*.keras``, or ``*.weights.h5`` with ``save_weights_only=True``; may have
            fields, such as ``{epoch:02d}`` and ``{val_swa_loss:.3f}``.
          monitor: the metric that tells which is best; by default the average's loss, which is
            ``val_swa_loss``, or ``val_loss`` with ``validate="average"``. Whether more or less of
            ``val_swa_accuracy`` is better is found as Keras does for ``val_accuracy``.
          update_bn: whether the batch-norm statistics are recomputed with ``bn_data``; it costs
            nothing where validation has done so.
          arguments: ``save_best_only``, ``save_weights_only``, ``mode``, ``save_freq``,
            ``verbose`` and ``initial_value_threshold`` of ``ModelCheckpoint``.

        Raises:
          ConfigError: ``save_best_only`` by a metric that is not the average's.
          ValueError: what ``ModelCheckpoint`` refuses.

        >>> swa = SWA({"start": "50%"})
        >>> best = swa.checkpoint("best.keras", save_best_only=True)
        >>> best.monitor
        'val_swa_loss'
        """
        return AveragedCheckpoint(self, filepath, monitor, update_bn=update_bn, **arguments)

    def backup(
        self,
        backup_dir: str | os.PathLike[str],
        *,
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = True,
    ) -> Backup:
        """A callback for ``fit`` with which an interrupted training goes on, average included.

        Take it in the place of ``keras.callbacks.BackupAndRestore``, and run the same program
        again: ``fit`` goes on after the last backup. Model, optimizer, epoch, the state of this
        callback and that of the random numbers (of Python, numpy and torch) stand in one folder
        that gets its name when all of it has reached the disk, so a process may be killed at any
        moment. As in Keras, other callbacks (the patience of an ``EarlyStopping``), the history
        and, on tensorflow, the order of shuffled data are not in it, nor is what a callback listed
        after it does at the end of an epoch.

        Args:
          backup_dir: a local folder for these backups alone.
          save_freq: "epoch", or a number of batches. After such a backup Keras begins the epoch
            anew, with the weights of its middle, so that updates are made twice, and counted so.
          delete_checkpoint: whether the backups are removed when ``fit`` has come to its end.

        Raises:
          ValueError: what ``BackupAndRestore`` refuses; in ``fit``:
          SWAError: the model is not built, so nothing can be loaded into it.
          StateError: the backup is of another configuration or training, or damaged.
          StructureError: it is of another model.

        >>> swa = SWA({"start": "50%"})
        >>> callbacks = [swa, swa.backup("out/backup")]
        """
        return Backup(self, backup_dir, save_freq=save_freq, delete_checkpoint=delete_checkpoint)

    # Inside

    def _expects_average(self) -> bool:
        """Whether there will be an average at the end of this fit; warns, once, if not."""
        expects = bool(self.n_averaged) or self._progress.snapshot_to_come
        if not expects and not self._warned_none:
            self._warned_none = True
            warnings.warn(
                f"SWA: no snapshot falls into this training. It ends at {self._progress.end}, and "
                f"the schedule is {self.schedule} (start {self.config.start}, every "
                f"{self.config.every}). Start sooner or train longer; in a later fit the callback "
                "goes on counting.",
                SWAWarning,
                stacklevel=3,
            )
        return expects

    def _end_epoch(self) -> None:
        """Takes the snapshot of the end of an epoch, where epochs are counted."""
        if self._progress.end_epoch():
            self._average.add(averaged_variables(self.model), self._progress.updates())

    def _context_for_validation(self) -> AbstractContextManager[Any] | None:
        # Validation comes before on_epoch_end, and must see the snapshot of this epoch.
        self._end_epoch()
        return self._lent(self.model, update_bn=self._bn_validate) if self.n_averaged else None

    def _lent(self, model: Any, *, update_bn: bool) -> AbstractContextManager[Any]:
        """``averaged``, with the choice of leaving the batch-norm statistics alone."""
        return self._lender.averaged(usable(model), update_bn=update_bn)

    @property
    def _metrics_prefix(self) -> str | None:
        """What the names of the average's metrics in the logs begin with; None without them."""
        return {"both": f"val_{self._name}_", "average": "val_", "raw": None}[self._validate]

    def _catch_up(self, *, epoch_ended: bool) -> None:
        """Takes a snapshot that is due, for callbacks that are listed before this one."""
        if epoch_ended:
            self._end_epoch()
        elif self._progress.in_fit:
            synced(self._model)
            self._look()

    def _is_in(self, model: Any) -> bool:
        """Whether a model's weights are the average."""
        return self._average.is_in(averaged_variables(synced(model)))

    def _remove_validation(self) -> None:
        if self._validation is not None:
            self._validation.remove()
            self._validation = None


def _faults(bn_data: Any, validate: Any, name: Any) -> list[Fault]:
    faults = []
    if validate not in ("both", "average", "raw"):
        faults.append(Fault("validate", f'expected "both", "average" or "raw", got {validate!r}.'))
    if not isinstance(name, str) or not name.isidentifier():
        faults.append(Fault("name", f'expected a name such as "swa" or "ema", got {name!r}.'))
    if bn_data is not None and (fault := fault_of(bn_data)):
        faults.append(Fault("bn_data", fault))
    return faults
