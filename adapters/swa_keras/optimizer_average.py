"""The running average of an optimizer: variables of its own, read as other averages are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy.typing as npt

from swa_core import SWAError, SWAState
from swa_core.averaging import NonFinite
from swa_core.rules import Rule
from swa_keras.averages import RunningAverage, hold, leaves_of, match, same_objects
from swa_keras.backend import Loan, Tensor, Variable, current
from swa_keras.in_graph import Counters, Micro
from swa_keras.model_state import synced


class OptimizerAverage:
    """What the optimizer averages, with the attributes of ``RunningAverage`` that reading needs.

    Args:
      rule: how much each snapshot weighs.
      nonfinite: what becomes of a snapshot with NaN or Inf.
      counters: scalar variables of the optimizer.

    Attributes:
      variables: the trained variables that are averaged; none before the optimizer is built.
      averages: the optimizer's variable for each of them, float32 or wider.
      micro: how the inner optimizer counts batches; None before the optimizer is built.
      swap: what the model that it is lent to must be given back, or None; whoever lends it sets it.
    """

    def __init__(self, rule: Rule, nonfinite: NonFinite, counters: Counters) -> None:
        self._rule = rule
        self._nonfinite = nonfinite
        self.counters = counters
        self.backend = current()
        self.variables: list[Variable] = []
        self.averages: list[Variable] = []
        self.micro: Micro | None = None
        self.swap: Any = None
        self._known: list[Variable] = []
        self._loan: Loan | None = None
        self._model: Callable[[], Any] = lambda: None

    def train(self, model: Any) -> None:
        """Brings the values home from this model in training, where reading finds them gone."""
        self._model = weakref.ref(model)

    @property
    def updates(self) -> int:
        """Completed updates since the optimizer was made."""
        return self._read(self.counters.n_updates)

    @property
    def n_averaged(self) -> int:
        """Snapshots in the average."""
        return self._read(self.counters.n_averaged)

    @property
    def n_skipped(self) -> int:
        """Snapshots left out because they held NaN or Inf."""
        return self._read(self.counters.n_skipped)

    @property
    def total(self) -> float:
        """The sum of the snapshots' weights relative to the newest; see ``swa_core.rules``."""
        n = self.n_averaged
        return 1.0 / self._rule.mixing_weight(float(n)) if n else 0.0

    def state(self) -> SWAState:
        """The counters as the core has them, without arrays."""
        return SWAState(self.updates, self.n_averaged, self.n_skipped, self.total, None)

    @property
    def paths(self) -> list[str]:
        """The paths of the averaged variables in the model; none while nothing is averaged."""
        return list(leaves_of(self.variables)) if self.n_averaged else []

    def match(self, variables: Sequence[Variable], what: str) -> None:
        """Makes sure that these are the variables that are averaged.

        Raises:
          StructureError: naming the first variable that differs.
        """
        if self.variables and not same_objects(self._known, variables):
            match(leaves_of(self.variables), variables, what)
            self._known = list(variables)

    def lend(self, variables: Sequence[Variable]) -> Loan:
        """Puts the average into variables that were matched with it, until ``end``."""
        self._loan = self.backend.lend(variables, self._tensors())
        return self._loan

    def end(self, *, keep: bool = False) -> bool:
        """Ends a loan; see ``RunningAverage.end``."""
        assert self._loan is not None
        was_written = self._loan.keep() if keep else self._loan.undo()
        self._loan = None
        return was_written

    def is_in(self, variables: Sequence[Variable]) -> bool:
        """Whether variables that were matched with it hold the average; see ``RunningAverage``."""
        return hold(variables, self._tensors())

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Copies of the averages on the host; none while nothing is averaged."""
        if not self.n_averaged:
            return []
        # While they are lent, their own memory may hold the weights.
        tensors = self._tensors() if self._loan is None else self._loan.averages
        return [self.backend.to_numpy(tensor) for tensor in tensors]

    def _tensors(self) -> list[Tensor]:
        return [average.value for average in self.averages]

    def load(self, counters: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Takes over the counters and arrays of a saved state; nothing is changed by a bad one.

        Raises:
          SWAError: the optimizer is not built.
          StateError: the arrays are missing, or do not fit their paths.
          StructureError: they are of other weights.
        """
        if not self.variables:
            raise SWAError(
                "the optimizer is not built, so there is nothing to load an average into.",
                hint="call optimizer.build(model.trainable_variables) first.",
            )
        held = RunningAverage(self._rule, self._nonfinite)
        held.load(dict(counters), saved)
        held.match(self.variables, "cannot load the saved average")
        if held.n_averaged:
            held.assign_to(self.averages)
        for name, counter in self.counters._asdict().items():
            counter.assign(counters[name])

    def _read(self, counter: Variable) -> int:
        model = self._model()
        if model is not None:
            synced(model)
        if keras.backend.backend() == "jax" and counter._value is None:
            raise SWAError(
                "between two steps of fit, jax keeps the optimizer's variables elsewhere.",
                hint="in a callback, reach the optimizer as self.model.optimizer.",
            )
        return int(self.backend.to_numpy(counter.value))
