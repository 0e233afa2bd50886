"""The optimizer wrapper: averaging inside the compiled training step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from swa_core import Schedule, StateError, StructureError, SWAConfig, SWAError
from swa_core.saving import header, read_header
from swa_keras import in_graph
from swa_keras.averages import leaves_of, refuse_nothing
from swa_keras.backend import Variable, wide
from swa_keras.in_graph import Counters, Micro, Plan
from swa_keras.learning_rate import check_scheduled
from swa_keras.lending import Lender, usable
from swa_keras.model_state import averaged_variables, is_averaged
from swa_keras.optimizer_average import OptimizerAverage
from swa_keras.saving import check_live, give_back, live_of, saved_live
from swa_keras.wrapped_optimizers import accumulation, makers

_HEADER, _AVERAGE = "swa", "average_{}"


@keras.saving.register_keras_serializable(package="swa_keras")
class SWAOptimizer(keras.optimizers.Optimizer):
    """Averages the weights that another optimizer trains, inside its compiled step.

    For averages that move at every update (an EMA), on the tensorflow, jax and torch backends; it
    is right for any schedule. The training itself is that of the inner optimizer, to the last
    bit. Only completed updates count: with gradient accumulation the inner optimizer's, and under
    a ``LossScaleOptimizer`` (around this one, where ``compile`` puts it for ``mixed_float16``)
    those that were not left out.

    The average is one more set of optimizer variables, float32 or wider, with the layout of the
    weights; it is there from the build of the optimizer on, and is saved and restored with the
    rest of its state (``model.save``, ``save_weights``, ``BackupAndRestore``). Variables that a
    gradient overwrites (the scales of float8) are not weights, and are left out.

    In ``fit`` the callback ``SWA()``, without a configuration, validates on this average and ends
    the training on it. Without the callback, use ``averaged`` and ``finalize``.

    Args:
      optimizer: makes the updates; an optimizer, or what ``compile`` takes for one.
      config: a ``SWAConfig``, a mapping of its fields, or the path of a file with ``[swa]``. With
        ``[swa.lr]`` the inner optimizer's learning rate must be the ``SWASchedule`` of it.
      steps_per_epoch: updates per epoch, where the configuration counts epochs.
      total_steps: updates in all, where it has percentages.
      name: of the optimizer.

    Attributes:
      inner_optimizer: the optimizer that makes the updates.
      config: the configuration.
      schedule: which updates are snapshots.

    Raises:
      ConfigError: everything wrong with the configuration; a length is missing.
      SWAError: an inner optimizer that cannot be averaged over: ``use_ema``, a
        ``LossScaleOptimizer``, another ``SWAOptimizer``, or a rate that is not the one of
        ``[swa.lr]``.
      ValueError: no optimizer at all (from Keras).

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1; for ``rule = "ema"`` see ``swa_core.EMA``.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> ema = {"start": "1step", "every": "1step", "rule": {"name": "ema", "decay": 0.9}}
    >>> optimizer = SWAOptimizer(keras.optimizers.SGD(0.1), ema)
    >>> model.compile(optimizer, "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0)
    >>> optimizer.updates, optimizer.n_averaged
    (4, 4)
    >>> with optimizer.averaged(model):
    ...     loss = model.evaluate(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    """

    def __init__(
        self,
        optimizer: Any,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        inner = keras.optimizers.get(optimizer)
        _check_inner(inner)
        # The rate is the inner optimizer's; this one is never asked for.
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner
        self.config = SWAConfig.of(config)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.schedule: Schedule = self.config.schedule(**lengths)
        check_scheduled(inner, self.config.lr_schedule(**lengths))
        self._step = in_graph.of_backend(
            Plan(self.schedule, self.config.rule, self.config.nonfinite)
        )
        self.average = OptimizerAverage(
            self.config.rule, self.config.nonfinite, Counters(*map(self._counter, Counters._fields))
        )
        self._lender = Lender(self.average)

    def _counter(self, name: str) -> Variable:
        # On torch, which is eager, they are read in every step and must not make it wait.
        on_host = keras.backend.backend() == "torch"
        with keras.device("cpu") if on_host else nullcontext():
            return self.add_variable(
                shape=(), dtype="int32", aggregation="only_first_replica", name=f"swa_{name}"
            )

    @property
    def updates(self) -> int:
        """Completed updates since this optimizer was made."""
        return self.average.updates

    @property
    def n_averaged(self) -> int:
        """The number of snapshots in the average."""
        return self.average.n_averaged

    @property
    def n_skipped(self) -> int:
        """The number of snapshots left out because they held NaN or Inf."""
        return self.average.n_skipped

    # Using the average

    @property
    def averaged_weights(self) -> list[npt.NDArray[Any]]:
        """Copies of the averages, float32 or wider, in the order of ``model.trainable_variables``.

        Before the first snapshot these are the live weights, and a warning says so once.

        Raises:
          SWAError: the optimizer is not built.
        """
        if not self.built:
            raise SWAError(
                "the optimizer is not built, so there is nothing to average yet.",
                hint="call optimizer.build(model.trainable_variables) first, or train.",
            )
        return self._lender.weights(lambda: self.average.variables)

    def averaged(
        self, model: keras.Model, bn_data: Any = None
    ) -> AbstractContextManager[keras.Model]:
        """A context in which the model computes with the averaged weights.

        Whatever is raised inside, the training weights are back afterwards, and with them the
        batch-norm statistics, seeds and other state of the layers. With nothing averaged yet the
        model keeps its live weights, and a warning says so once.

        Args:
          model: the model that is trained, or one of the same structure.
          bn_data: recompute the batch-norm statistics on it, see ``update_bn``; by default they
            are those of the training weights.

        Yields:
          The model.

        Raises:
          SwappedError: inside another ``averaged()``.
          StructureError: another model than the one that was averaged.
        """
        return self._lender.averaged(usable(model), bn_data)

    def finalize(self, model: keras.Model, bn_data: Any = None) -> None:
        """Makes the average the model's weights for good.

        The optimizer stays what it is. To save a model that loads where swa_keras is not
        installed, call ``unwrap`` as well, or load it with ``compile=False``.

        Args:
          model: the model that was trained, or one of the same structure.
          bn_data: recompute the batch-norm statistics on it.

        Raises:
          NothingAveragedError: before the first snapshot.
          SwappedError: inside ``averaged()``.
          StructureError: another model than the one that was averaged. After any error the model
            has the weights it had.
        """
        model = usable(model)
        self._lender.finalize(model, bn_data, updates=self.updates, schedule=self.schedule)

    def unwrap(self, model: keras.Model) -> None:
        """Gives a compiled model its inner optimizer back; the average stays in this object.

        What is saved of the model then needs nothing but Keras (unless the learning rate is a
        ``SWASchedule``, which is in the file if the inner optimizer has one).

        Args:
          model: compiled with this optimizer, by itself or inside a ``LossScaleOptimizer``.

        Raises:
          SWAError: it is compiled with another optimizer.
        """
        outer = getattr(model, "optimizer", None)
        model = usable(model)
        if outer is self:
            model.optimizer = self.inner_optimizer
        elif getattr(outer, "inner_optimizer", None) is self:
            outer.inner_optimizer = self.inner_optimizer
        else:
            raise SWAError(
                f"the model is compiled with {outer!r}, and not with this optimizer.",
                hint="call unwrap of the optimizer that the model was compiled with.",
            )
        compiled = model._compile_config.config
        if compiled["optimizer"] is self:
            compiled["optimizer"] = self.inner_optimizer
        # They were compiled with this optimizer inside.
        model.make_train_function(force=True)

    def lender(self, model: keras.Model, bn_data: Any) -> Lender:
        """For the callback: what lends the average to models, from now on this optimizer's too.

        Args:
          model: the model in training.
          bn_data: training data for batch-norm statistics, whenever the average is lent.
        """
        self._lender.refuse_swapped("train")
        self._lender = Lender(self.average, bn_data)
        self.average.train(model)
        return self._lender

    # What Keras asks of an optimizer

    def build(self, variables: Iterable[Variable]) -> None:
        """Makes the variables of the inner optimizer, and the averages.

        Args:
          variables: the trainable variables of the model.

        Raises:
          StructureError: nothing among them can be averaged; built before for others.
        """
        variables = list(variables)
        if self.built:
            self._refuse_others(variables)
            return
        for variable in variables:
            if not isinstance(variable, keras.Variable):
                raise StructureError(
                    f"cannot average {variable!r}, which is no keras.Variable.",
                    hint="build the optimizer with model.trainable_variables.",
                )
        averaged = [v for v in variables if is_averaged(v)]
        refuse_nothing(averaged, "cannot build the optimizer")
        inner = self.inner_optimizer
        if not inner.built:
            inner.build(variables)
        super().build(variables)
        self.average.micro = Micro(inner._iterations, accumulation(inner))
        self.average.averages = [self._average_of(v) for v in averaged]
        self.average.variables = averaged

    def _average_of(self, variable: Variable) -> Variable:
        name, dtype = "swa_average", wide(variable.dtype)
        if dtype == variable.dtype:
            return self.add_variable_from_reference(variable, name=name)
        # Keras makes a variable from a reference in the dtype of that.
        return self.add_variable(
            variable.shape,
            dtype=dtype,
            layout=getattr(variable, "_layout", None),
            name=f"{variable.path.replace('/', '_')}_{name}",
        )

    def apply(
        self, grads: Sequence[Any], trainable_variables: Iterable[Variable] | None = None
    ) -> None:
        """Updates the variables as the inner optimizer does, and averages if it is time.

        Args:
          grads: a gradient for each variable.
          trainable_variables: the variables; by default those that the optimizer was built with.

        Raises:
          StructureError: variables that it was not built with.
          SwappedError: inside ``averaged()`` (where the step is compiled, when it is).
        """
        self._lender.refuse_swapped("update the weights")
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
            self._refuse_unknown(trainable_variables)
        self.inner_optimizer.apply(grads, trainable_variables)
        if len(grads):  # without any, the inner optimizer did nothing
            average = self.average
            self._step(average.averages, average.variables, average.counters, average.micro)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """``apply`` on tensors, for jax: the updated trainable and optimizer variables."""
        if self.built:
            self._refuse_shapes([tuple(value.shape) for value in trainable_variables])
        new: tuple[list[Any], list[Any]] = super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        return new

    @property
    def variables(self) -> list[Variable]:
        """Counters and averages, and the variables of the inner optimizer."""
        found: list[Variable] = self._variables + self.inner_optimizer.variables
        return found

    @property
    def iterations(self) -> Any:
        """The inner optimizer's."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's, to be read and set."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self.inner_optimizer.learning_rate = rate

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's; a ``LossScaleOptimizer`` around this one sets it to None."""
        inner = vars(self).get("inner_optimizer")
        factor: float | None = getattr(inner, "loss_scale_factor", None)
        return factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if "inner_optimizer" in vars(self):  # Keras sets it before there is one
            self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss: Any) -> Any:
        """The loss as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """Excludes variables from the weight decay of the inner optimizer."""
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """What the inner optimizer does at the end of ``fit``; the average is not used by it."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all ``variables``, the inner optimizer's too.

        Raises:
          StateError: their number or a shape is not that of ``variables``.
        """
        shapes = [tuple(np.shape(value)) for value in weights]
        wanted = [tuple(v.shape) for v in self.variables]
        if shapes != wanted:
            raise StateError(
                f"the values have shapes {shapes}, and the optimizer's variables {wanted}.",
                hint="build the optimizer, and take the values of one built for the same model.",
            )
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The average alone, as the callback's ``state_dict`` has it: plain values and arrays.

        Keras saves the average with the rest of the optimizer, so that this is for those who keep
        their own checkpoints. Saved inside ``averaged()`` it holds the training weights too (the
        file of a ``model.save`` there holds the average in their place, and only that).
        """
        average, swap = self.average, self._lender.swap
        return {
            **header(average.state(), self.schedule, self.config.rule),
            "unit": "update",
            "epochs": 0,
            "base_rate": None,
            "paths": average.paths,
            "average": average.arrays(),
            "live": saved_live(swap),
        }

    def load_state_dict(self, saved: Mapping[str, Any], model: keras.Model) -> None:
        """Goes on from a saved average; load the model's and the optimizer's weights first.

        Args:
          saved: what ``state_dict`` of this class or of the callback returned.
          model: the model in training, which gets its training weights back if the state was
            saved inside ``averaged()``.

        Raises:
          StateError: truncated, damaged, newer, of another schedule or rule, or counted in epochs.
          StructureError: of other weights. After any error nothing has changed.
          SWAError: the model or the optimizer is not built.
        """
        self._lender.refuse_swapped("load a state")
        model = usable(model)
        counters = read_header(saved, self.schedule, self.config.rule)
        if saved.get("unit") == "epoch":
            raise StateError(
                "the saved average counted epochs, and an optimizer counts updates.",
                hint="start a new average.",
            )
        live = live_of(saved)
        self.average.match(averaged_variables(model), "cannot load the saved average")
        if live is not None:
            check_live(model, live)
        self.average.load(counters, saved)
        self._lender.take(self.average)
        if live is not None:
            give_back(model, live)

    def save_own_variables(self, store: Any) -> None:
        """Writes counters and averages; Keras saves the inner optimizer beside them."""
        average = self.average
        head = header(average.state(), self.schedule, self.config.rule) | {"paths": average.paths}
        # Every format of Keras takes arrays, and only those.
        store[_HEADER] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        for number, array in enumerate(average.arrays()):
            store[_AVERAGE.format(number)] = array

    def load_own_variables(self, store: Any) -> None:
        """Reads what ``save_own_variables`` wrote.

        Raises:
          StateError: truncated, damaged, newer, or of another schedule or rule.
          StructureError: of other weights. After any error the average is what it was.
        """
        if _HEADER not in store.keys():  # noqa: SIM118 - Keras' stores are no mappings
            raise StateError(
                "the saved optimizer holds no average; it was no SWAOptimizer.",
                hint="load the model with compile=False, compile it with this optimizer, and start "
                "a new average.",
            )
        try:
            head = json.loads(np.asarray(store[_HEADER], np.uint8).tobytes())
        except ValueError as error:
            raise StateError(
                f"the saved average is damaged: its header cannot be read ({error}).",
                hint="load an earlier checkpoint.",
            ) from error
        counters = read_header(head, self.schedule, self.config.rule)
        names = [_AVERAGE.format(number) for number in range(len(head.get("paths", [])))]
        found = {*store.keys()}
        arrays = [np.asarray(store[name]) for name in names if name in found]
        self.average.load(counters, {**head, "average": arrays})
        self._lender.take(self.average)

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain values, for ``from_config``."""
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "config": self.config.to_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> SWAOptimizer:
        """The optimizer that ``get_config`` described, with nothing averaged."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("optimizer"), custom_objects=custom_objects
        )
        return cls(inner, config.pop("config"), **config)

    def __dir__(self) -> list[str]:
        # To find what else is to be saved, Keras reads every attribute that is listed here, and
        # this one copies all averages to the host.
        return [name for name in super().__dir__() if name != "averaged_weights"]

    # Bad input

    def _refuse_unknown(self, variables: Sequence[Variable]) -> None:
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                raise StructureError(
                    f"cannot update variable '{getattr(variable, 'path', variable)}': the "
                    "optimizer was not built with it.",
                    hint=_ANEW,
                )

    def _refuse_others(self, variables: Sequence[Variable]) -> None:
        self._refuse_unknown(variables)
        given = {self._var_key(v) for v in variables}
        for variable in self._trainable_variables:
            if self._var_key(variable) not in given:
                raise StructureError(
                    f"cannot build the optimizer again: variable '{variable.path}' is missing.",
                    hint=_ANEW,
                )

    def _refuse_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Refuses the values of other variables, by the path of the first that differs."""
        paths = list(leaves_of(self._trainable_variables))
        wanted = [tuple(v.shape) for v in self._trainable_variables]
        for path, shape, given in zip(paths, wanted, shapes, strict=False):
            if shape != given:
                raise StructureError(
                    f"cannot update variable '{path}' of shape {shape} with a value of {given}.",
                    hint=_ANEW,
                )
        if len(shapes) != len(wanted):
            first = paths[len(shapes)] if len(shapes) < len(paths) else None
            raise StructureError(
                f"cannot update {len(shapes)} variables: the optimizer was built with "
                f"{len(wanted)}" + (f", '{first}' among them." if first else "."),
                hint=_ANEW,
            )


_ANEW = (
    "if the model changed on purpose (layers frozen or unfrozen too), compile it with a new "
    "optimizer."
)


def _check_inner(inner: Any) -> None:
    if inner is None:
        raise SWAError(
            "SWAOptimizer(None, ...): there is no optimizer to wrap.",
            hint='pass one, such as keras.optimizers.SGD(0.1) or "sgd".',
        )
    if isinstance(inner, SWAOptimizer):
        raise SWAError(
            "a SWAOptimizer cannot wrap another one.",
            hint="for a second average, add the callback SWA(config) to fit.",
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise SWAError(
            "a SWAOptimizer cannot wrap a LossScaleOptimizer, whose updates may be left out.",
            hint="wrap the other way round: LossScaleOptimizer(SWAOptimizer(optimizer, config)). "
            "For mixed_float16 compile() does so by itself.",
        )
    if any(getattr(maker, "use_ema", False) for maker in makers(inner)):
        raise SWAError(
            "the optimizer has use_ema=True: Keras then overwrites the weights with an average of "
            "its own at the end of training, and this average would be of those too.",
            hint='use use_ema=False and, for an EMA, rule = { name = "ema", decay = 0.999 }.',
        )
