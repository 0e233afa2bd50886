"""What the callback is without ``fit``: an average of a model, used, saved and gone on with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import keras
import numpy.typing as npt

from swa_core import Schedule, StateError, StructureError, SWAConfig, SWAError, SWAState
from swa_core.interrupts import uninterrupted
from swa_core.saving import header
from swa_keras import checking, files
from swa_keras.averages import RunningAverage
from swa_keras.caveats import Caveats
from swa_keras.following import Following, averaging_optimizer
from swa_keras.learning_rate import check_settable
from swa_keras.lending import Lender, usable
from swa_keras.model_state import averaged_variables, synced
from swa_keras.optimizer_average import OptimizerAverage
from swa_keras.progress import Progress
from swa_keras.ranks_torch import unwrapped
from swa_keras.saving import check_live, give_back, live_of, progress_of, saved_live


class Averaging(keras.callbacks.Callback):
    """An average, the training it is of, and the ways to use both; see ``SWA``.

    Args:
      config: a ``SWAConfig``, a mapping, a path; None for the average of a ``SWAOptimizer``.
      bn_data: training data for batch-norm statistics, or None.
      caveats: what a training is warned of when it begins.
    """

    def __init__(
        self,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
        bn_data: Any,
        caveats: Caveats,
    ) -> None:
        super().__init__()
        # Without a configuration it is a SWAOptimizer's, once there is a model.
        self._follows = config is None
        self.config = SWAConfig() if config is None else SWAConfig.of(config)
        self._bn_data = bn_data
        self._caveats = caveats
        self._progress = Progress(self.config)
        self._lender = Lender(RunningAverage(self.config.rule, self.config.nonfinite), bn_data)
        # Of a loaded state: training weights that wait for a built model.
        self._live_to_load: tuple[list[Any], list[Any]] | None = None
        # The model that the updates are of.
        self._trained: Any = None

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
        >>> from swa_keras import SWA
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
        with uninterrupted():  # or the update would be averaged, and not counted
            if is_snapshot:
                self._average.add(averaged_variables(synced(model)), update)
            self._progress.completed(update)
        self._progress.prepare_next(lambda: model)

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
        self._progress.load(saved, counters["n_updates"], progress)
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
        >>> from swa_keras import SWA
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
    ) -> Self:
        """A callback that goes on from an average in a file.

        Args:
          path: the file.
          model: needed for what another framework has saved; built. (What this class has saved is
            matched with a model by the order of its variables.)
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
            self._take(model)

    def _look(self) -> None:
        """Takes the snapshot if one is due."""
        model = self.model
        if self._progress.look(model):
            self._take(model)

    def _take(self, model: Any) -> None:
        with uninterrupted():
            self._average.add(averaged_variables(model), self._progress.updates())
            self._progress.taken()

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
        # ``evaluate(callbacks=[swa])`` of another model makes that one ours, in Keras' eyes.
        own = self._trained if self._trained is not None else self.model
        return usable(own if model is None else model)
