"""The callback: stochastic weight averaging in ``model.fit``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import keras
import numpy.typing as npt

from swa_core import (
    ConfigError,
    Schedule,
    StateError,
    StructureError,
    SWAConfig,
    SWAError,
    SWAState,
    SWAWarning,
)
from swa_core.errors import Fault
from swa_core.saving import header
from swa_keras import checking, files
from swa_keras.averages import RunningAverage, refuse_nothing
from swa_keras.backup import Backup
from swa_keras.batches import fault_of
from swa_keras.caveats import Caveats
from swa_keras.checkpoint import AveragedCheckpoint
from swa_keras.following import Following, averaging_optimizer
from swa_keras.learning_rate import check_settable
from swa_keras.lending import Lender, usable
from swa_keras.model_state import averaged_variables, synced
from swa_keras.optimizer_average import OptimizerAverage
from swa_keras.progress import Progress
from swa_keras.ranks_torch import unwrapped
from swa_keras.saving import check_live, give_back, live_of, progress_of, saved_live
from swa_keras.validation import Validation

Validate = Literal["both", "average", "raw"]


class SWA(keras.callbacks.Callback):
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
        super().__init__()
        # Without a configuration it is a SWAOptimizer's, once there is a model.
        self._follows = config is None
        self.config = SWAConfig() if config is None else SWAConfig.of(config)
        if faults := _faults(bn_data, validate, name):
            raise ConfigError(faults, source="SWA(...)")
        self._bn_data = bn_data
        self._validate = validate
        self._name = name
        self._bn_validate = bn_validate
        self._finalize_at_end = finalize
        self._progress = Progress(self.config)
        self._lender = Lender(RunningAverage(self.config.rule, self.config.nonfinite), bn_data)
        self._validation: Validation | None = None
        # Of a loaded state: training weights that wait for a built model.
        self._live_to_load: tuple[list[Any], list[Any]] | None = None
        self._caveats = Caveats(
            recomputes=bn_data is not None, uses_average=finalize or validate != "raw"
        )
        # The model that the updates are of.
        self._trained: Any = None
        self._unbuilt = False
        self._expects = True
        self._warned_none = False
        # What was said about lists of callbacks.
        self._noticed: set[str] = set()

    def set_model(self, model: keras.Model) -> None:
        """Takes the average of its optimizer, if it has no configuration of its own."""
        if self._follows and model is not None:
            optimizer = averaging_optimizer(model)
            if getattr(self._progress, "optimizer", None) is not optimizer:
                self.config = optimizer.config
                self._progress = Following(optimizer)
                self._lender = optimizer.lender(model, self._bn_data)
        super().set_model(model)

    @property
    def schedule(self) -> Schedule | None:
        """Which updates are snapshots, known from the start of the training on; in epochs where
        Keras does not know the number of steps per epoch."""
        return self._progress.schedule

    @property
    def updates(self) -> int:
        """Completed optimizer updates. During ``fit`` it asks the optimizer, which on jax brings
        the model's variables up to date."""
        return self._progress.updates(self._model)

    @property
    def n_averaged(self) -> int:
        """The number of snapshots in the average."""
        return self._average.n_averaged

    @property
    def n_skipped(self) -> int:
        """The number of snapshots left out because they held NaN or Inf."""
        return self._average.n_skipped

    @property
    def averaged_weights(self) -> list[npt.NDArray[Any]]:
        """Copies of the averages, float32 or wider, in the order of ``model.trainable_variables``.

        Where ``keras.distribution`` shards weights over several processes, all of them have to ask
        (so for ``state_dict``), for each gets the whole of what it has but a part of.

        Before the first snapshot these are the live weights, and a warning says so once.
        """
        return self._lender.weights(lambda: averaged_variables(unwrapped(usable(self.model))))

    # Loops without fit

    def begin(
        self,
        model: keras.Model,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Starts a training in a loop of one's own; then call ``update`` after each update.

        Args:
          model: the model to be trained.
          steps_per_epoch: updates per epoch, where the configuration counts epochs.
          total_steps: updates in all, where it has percentages. Both may be left out where the
            callback goes on from an earlier training.

        Raises:
          ConfigError: a length that the configuration needs is missing.
          StructureError: another model than before.
        """
        self._lender.refuse_swapped("begin a training")
        model = unwrapped(model)
        self._refuse_other(model, "cannot begin a training")
        self.set_model(model)
        self._check(model)
        self._settle(model)
        self._progress.begin(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self._progress.take_rate(model)
        self._caveats.say(model)
        self._load_into(model)
        self._progress.prepare_next(lambda: model)

    def update(self, model: keras.Model) -> None:
        """Counts one completed optimizer update in a loop without ``fit``.

        Call it after every ``train_on_batch`` or step of a custom loop that completed an update.
        Without ``begin`` the configuration must be in steps.

        Args:
          model: the model that was updated, with its values in its variables (on jax, after a
            stateless step, assign them first).

        Raises:
          SwappedError: inside ``averaged()``.
          StructureError: another model than before; the average stays as it was.
          SWAError: in a ``fit`` that has this callback, which counts by itself; after one whose
            clock ticked in epochs.

        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> swa = SWA({"start": "2step", "every": "2step"})
        >>> for _ in range(5):
        ...     loss = model.train_on_batch(np.ones((8, 2)), np.ones((8, 1)))
        ...     swa.update(model)
        >>> swa.n_averaged
        2
        """
        self._lender.refuse_swapped("count an update")
        model = unwrapped(model)
        if self.schedule is None:
            self.begin(model)
        elif model is not self._trained:
            self._refuse_other(model, "cannot count an update")
        update, is_snapshot = self._progress.following()
        if is_snapshot:
            self._average.add(averaged_variables(synced(model)), update)
        self._progress.completed(update)
        self._progress.prepare_next(lambda: model)

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
        elif self._expects:
            skipped = f" ({self.n_skipped} held NaN or Inf)" if self.n_skipped else ""
            warnings.warn(
                f"SWA: no snapshot was averaged in {self.updates} updates{skipped}; the model "
                f"keeps its training weights. The schedule is {self.schedule}.",
                SWAWarning,
                stacklevel=2,
            )

    # Using the average

    def averaged(
        self, model: keras.Model | None = None, bn_data: Any = None
    ) -> AbstractContextManager[Any]:
        """A context in which the model computes with the averaged weights.

        Whatever is raised inside, the training weights are back afterwards, and with them the
        batch-norm statistics, seeds and other state of the layers. With nothing averaged yet the
        model keeps its live weights, and a warning says so once.

        Args:
          model: the model; by default the one in training. Wrapped in torch's
            DistributedDataParallel, ``bn_data`` is pooled over its processes, which all call this.
          bn_data: recompute the batch-norm statistics on it; by default the callback's.

        Yields:
          The model.

        Raises:
          SwappedError: inside another ``averaged()``.
          StructureError: another model than the one that was averaged.
        """
        return self._lender.averaged(self._model_or(model), bn_data)

    def finalize(self, model: keras.Model | None = None, bn_data: Any = None) -> None:
        """Makes the average the model's weights for good.

        Args:
          model: the model; by default the one in training. Wrapped in torch's
            DistributedDataParallel, ``bn_data`` is pooled over its processes, which all call this.
          bn_data: recompute the batch-norm statistics on it; by default the callback's.

        Raises:
          NothingAveragedError: before the first snapshot.
          SwappedError: inside ``averaged()``.
          StructureError: another model than the one that was averaged. After any error the model
            has the weights it had.
        """
        updates = self._progress.updates()
        self._lender.finalize(
            self._model_or(model), bn_data, updates=updates, schedule=self.schedule
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
        anywhere, without this package. It may stand before or after this callback. While there is
        no snapshot it saves nothing and, with ``verbose=1``, says so; a training in which nothing
        was saved ends with a warning. With ``save_best_only``, epochs that are not validated
        (``validation_freq``) are left out.

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

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on averaging: plain Python values and numpy arrays.

        Save it together with the model's and the optimizer's weights. Saved inside
        ``averaged()`` it holds the training weights too, and gives them back when loaded.
        """
        swap = self._lender.swap
        if swap is None and self._progress.can_look(self._model):
            # A snapshot that is due belongs to the updates that are saved.
            self._look()
        average, updates = self._average, self._progress.updates()
        state = SWAState(updates, average.n_averaged, average.n_skipped, average.total, None)
        live = self._live_to_load and dict(
            zip(("weights", "state"), self._live_to_load, strict=True)
        )
        return {
            **header(state, rule=self.config.rule),
            **self._progress.saved(),
            "paths": average.paths,
            "average": average.arrays(),
            "live": live if swap is None else saved_live(swap),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state; load the model's and the optimizer's weights first.

        May be called before ``fit``; what depends on the model and on the lengths of the training
        is then checked and applied when ``fit`` starts.

        Args:
          saved: what ``state_dict`` returned.

        Raises:
          StateError: truncated, damaged, newer, or of another schedule or rule.
          StructureError: of other weights. After any error nothing has changed.
        """
        self._lender.refuse_swapped("load a state")
        if self._follows and self._model is None:
            raise SWAError(
                "SWA() without a configuration has no average of its own to load into.",
                hint="call swa.begin(model) first; or load the optimizer's variables with the "
                "model's, as Keras does, and nothing here.",
            )
        counters = self._progress.check(saved)
        progress, live = progress_of(saved), live_of(saved)
        average = RunningAverage(self.config.rule, self.config.nonfinite)
        average.load(counters, saved)
        model = self._model
        if model is not None and model.built:
            average.match(averaged_variables(synced(model)), "cannot load the saved average")
            if live is not None:
                check_live(model, live)
        if isinstance(self._average, OptimizerAverage):
            self._average.load(counters, saved)
            average = self._average
        self._lender.take(average)
        self._live_to_load = live
        self._trained = None
        self._progress.load(saved, counters["updates"], progress)
        if model is not None and model.built:
            self._load_into(model)
            self._progress.prepare_next(lambda: model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes configuration and state into one safetensors file, whole or not at all.

        Save the model and its optimizer beside it. The file is read by ``load``, in any framework
        by ``swa_core.load_average``, and by every reader of safetensors, which finds the averages
        under the paths of the variables.

        Args:
          path: the file, by custom ``*.safetensors``; replaced if it is there.

        Raises:
          OSError: it cannot be written; an older one is still there.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
        >>> swa = SWA({"start": "1step", "every": "1step"})
        >>> swa.update(model)
        >>> swa.save(f"{folder}/average.safetensors")
        >>> swa = SWA.load(f"{folder}/average.safetensors")
        >>> swa.n_averaged, swa.config.every
        (1, '1step')
        """
        files.write(path, self.state_dict(), self.config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: keras.Model | None = None,
        names: Mapping[str, str] | None = None,
        transform: Mapping[str, Callable[[Any], Any]] | None = None,
        **arguments: Any,
    ) -> SWA:
        """A callback that goes on from an average in a file.

        Args:
          path: the file.
          model: needed for what another framework has saved; built.
          names: then, for every trainable variable of the model, by path, the name in the file; by
            default they are the same.
          transform: for variables that lie otherwise in the file, by path, a function that makes
            the one numpy array out of the other (``numpy.transpose`` for the weight of a torch
            ``Linear``).
          arguments: as for ``SWA``, beside the configuration, which comes from the file.

        Raises:
          StateError: no saved average, damaged, of a newer version; of another adapter, and no
            model was given.
          StructureError: of other variables than the model's.
          OSError: the file cannot be read.
        """
        if model is None and (names is not None or transform is not None):
            raise TypeError("names and transform are for the variables of a model: model=...")
        if model is None:
            config, saved = files.read(path)
        else:
            config, saved = files.read_for(model, path, names, transform)
        swa = cls(config, **arguments)
        swa.load_state_dict(saved)
        return swa

    # Inside

    @property
    def _average(self) -> RunningAverage | OptimizerAverage:
        return self._lender.average

    def _check(self, model: Any) -> None:
        """Refuses optimizers that this callback cannot work with."""
        checking.refuse_use_ema(model)
        if self.config.lr is not None:
            check_settable(model)

    @property
    def _has_trained(self) -> bool:
        return bool(self._progress.updates() or self.n_averaged)

    def _refuse_other(self, model: Any, what: str) -> None:
        """Refuses to go on with another model than the one that was trained so far."""
        trained = self._trained
        if trained is not None and trained is not model and self._has_trained:
            if self.model is model:  # from fit
                self.set_model(trained)
            # Names the difference if there is one.
            self._average.match(averaged_variables(synced(model)), what)
            self._average.match(averaged_variables(synced(trained)), what)
            raise StructureError(
                f"{what}: this is another model than the one that was averaged.",
                hint="make a new SWA(...) for each model. If it is the same one, loaded anew, let "
                "a new SWA(...) load_state_dict(swa.state_dict()) of this one.",
            )
        self._trained = model

    def _settle(self, model: Any) -> None:
        """Ends the count of a fit that an exception ended."""
        if self._progress.settle(model):
            self._average.add(averaged_variables(model), self._progress.updates())
            self._progress.taken()

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

    def _look(self) -> None:
        """Takes the snapshot if one is due."""
        model = self.model
        if self._progress.look(model):
            self._average.add(averaged_variables(model), self._progress.updates())
            self._progress.taken()

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

    def _load_into(self, model: Any) -> None:
        """Applies what a loaded state holds for the model."""
        if not model.built:
            if self._live_to_load is not None:
                raise StateError(
                    "the loaded state holds the training weights of a model, and this one is not "
                    "built.",
                    hint="call the model on a batch and load its weights before fit.",
                )
            return
        self._average.match(averaged_variables(model), "cannot load the saved average")
        if self._live_to_load is not None:
            check_live(model, self._live_to_load)
            give_back(model, self._live_to_load)
            self._live_to_load = None

    def _model_or(self, model: Any) -> Any:
        return usable(self.model if model is None else model)


def _faults(bn_data: Any, validate: Any, name: Any) -> list[Fault]:
    faults = []
    if validate not in ("both", "average", "raw"):
        faults.append(Fault("validate", f'expected "both", "average" or "raw", got {validate!r}.'))
    if not isinstance(name, str) or not name.isidentifier():
        faults.append(Fault("name", f'expected a name such as "swa" or "ema", got {name!r}.'))
    if bn_data is not None and (fault := fault_of(bn_data)):
        faults.append(Fault("bn_data", fault))
    return faults
