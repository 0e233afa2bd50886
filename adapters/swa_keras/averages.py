"""The running average of a model's trainable weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from swa_core import StateError, StructureError
from swa_core.averaging import check_leaves
from swa_core.interrupts import uninterrupted
from swa_core.rules import Rule
from swa_keras.backend import Loan, Tensor, Variable, current, wide_dtype


class Leaf(NamedTuple):
    """What an average knows of a variable beside its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class RunningAverage:
    """Snapshots and their average, on the device and in the layout of the model's variables.

    Attributes:
      n_averaged: snapshots in the average.
      n_skipped: snapshots left out because they held NaN or Inf.
      total: the sum of the snapshots' weights relative to the newest; see ``swa_core.rules``.
      swap: what the model that it is lent to must be given back, or None; whoever lends it sets it.
    """

    def __init__(self, rule: Rule, nonfinite: str) -> None:
        self._rule = rule
        self._nonfinite = nonfinite
        self.backend = current()
        self.n_averaged = 0
        self.n_skipped = 0
        self.total = 0.0
        self.swap: Any = None
        self._leaves: dict[str, Leaf] = {}
        self._known: list[Variable] = []
        # Arrays of a saved state wait here until there is a model to place them beside.
        self._waiting: list[npt.NDArray[Any]] | None = None
        self._tensors: list[Tensor] = []
        self._loan: Loan | None = None

    @property
    def paths(self) -> list[str]:
        """The paths of the averaged variables in the model."""
        return list(self._leaves)

    def add(self, variables: Sequence[Variable], update: int) -> None:
        """Adds a snapshot.

        Args:
          variables: the trainable variables, with their values in place.
          update: the update that led to them, for messages.

        Raises:
          StructureError: not the variables of the first snapshot, or none at all.
        """
        what = f"cannot add snapshot {self.n_averaged + 1} at update {update}"
        refuse_nothing(variables, what)
        self.match(variables, what)
        if self._nonfinite == "skip" and not self.backend.all_finite(variables):
            self.n_skipped += 1
            return
        with uninterrupted():  # or the old average may be used up, and the new one not yet here
            if self.n_averaged:
                total = float(self._rule.retain(float(self.n_averaged)) * self.total + 1.0)
                self._tensors = self.backend.lerp(self._tensors, variables, 1.0 / total)
            else:
                total = 1.0
                self._tensors = self.backend.copies(variables)
                self._leaves = leaves_of(variables)
                self._known = list(variables)
            self.total = total
            self.n_averaged += 1

    def match(self, variables: Sequence[Variable], what: str) -> None:
        """Makes sure that these are the variables that are averaged.

        Args:
          variables: of the model that is to be used with this average.
          what: what cannot be done if they are not, the beginning of the message.

        Raises:
          StructureError: naming the first variable that differs.
        """
        if not self.n_averaged:
            return
        if not same_objects(self._known, variables):
            self._leaves = match(self._leaves, variables, what)
            self._known = list(variables)
        if self._waiting is not None:
            self._tensors = self.backend.from_numpy(self._waiting, variables)
            self._waiting = None

    def assign_to(self, variables: Sequence[Variable]) -> None:
        """Copies the average into variables that were matched with it."""
        self.backend.assign(variables, self._tensors)

    def lend(self, variables: Sequence[Variable]) -> Loan:
        """Puts the average into variables that were matched with it, until ``end``."""
        self._loan = self.backend.lend(variables, self._tensors)
        return self._loan

    def end(self, *, keep: bool = False) -> bool:
        """Ends a loan: the variables get their own values back, or keep the average.

        Returns:
          Whether the average was overwritten meanwhile.
        """
        assert self._loan is not None
        was_written = self._loan.keep() if keep else self._loan.undo()
        self._loan = None
        return was_written

    def is_in(self, variables: Sequence[Variable]) -> bool:
        """Whether variables that were matched with it hold the average, NaN for NaN."""
        return hold(variables, self._tensors)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Copies of the averages on the host."""
        if self._waiting is not None:
            return [array.copy() for array in self._waiting]
        # While they are lent, their own memory may hold the weights.
        tensors = self._tensors if self._loan is None else self._loan.averages
        return [self.backend.to_numpy(tensor) for tensor in tensors]

    def load(self, counters: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Takes over the counters and arrays of a saved state; nothing is changed by a bad one.

        Raises:
          StateError: the arrays are missing, or do not fit their paths.
        """
        arrays = saved.get("average")
        paths = saved.get("paths")
        if not isinstance(arrays, (list, tuple)) or not isinstance(paths, (list, tuple)):
            raise _truncated("its arrays are missing")
        if len(arrays) != len(paths) or bool(arrays) != bool(counters["n_averaged"]):
            raise _truncated(
                f"{len(arrays)} arrays for {len(paths)} weights and {counters['n_averaged']} "
                "snapshots"
            )
        try:
            waiting = [np.array(array) for array in arrays]
        except ValueError as error:
            raise StateError(
                f"the saved average is damaged: it holds what is no array ({error}).",
                hint="load an earlier checkpoint.",
            ) from error
        self.n_averaged = counters["n_averaged"]
        self.n_skipped = counters["n_skipped"]
        self.total = counters["total"]
        self._waiting = waiting or None
        self._tensors = []
        self._known = []
        self._leaves = {
            path: Leaf(array.shape, array.dtype) for path, array in zip(paths, waiting, strict=True)
        }


def refuse_nothing(variables: Sequence[Variable], what: str) -> None:
    """Raises ``StructureError`` if there is no variable to be averaged."""
    if not variables:
        raise StructureError(
            f"{what}: the model has no trainable floating-point weights.",
            hint="unfreeze a layer, or leave the callback out.",
        )


def _truncated(what: str) -> StateError:
    return StateError(
        f"the saved average is truncated: {what}.", hint="load an earlier checkpoint."
    )


def same_objects(known: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two lists hold the very same variables."""
    return len(known) == len(now) and all(a is b for a, b in zip(known, now, strict=True))


def hold(variables: Sequence[Variable], averages: Sequence[Tensor]) -> bool:
    """Whether variables hold averages in their own dtypes, NaN for NaN."""
    ops = keras.ops
    for average, variable in zip(averages, variables, strict=True):
        held, value = ops.cast(average, variable.dtype), variable.value
        both_nan = ops.logical_and(ops.isnan(held), ops.isnan(value))
        if not bool(ops.all(ops.logical_or(ops.equal(held, value), both_nan))):
            return False
    return True


def match(held: dict[str, Leaf], variables: Sequence[Variable], what: str) -> dict[str, Leaf]:
    """The leaves of variables, if they are what an average of ``held`` can be used with.

    Raises:
      StructureError: naming the first variable that differs.
    """
    new = leaves_of(variables)
    if len(new) == len(held):
        # Keras numbers layer names through a process (dense, dense_1), so a rebuilt model
        # has other paths: variables are matched by their place, as in set_weights.
        held = dict(zip(new, held.values(), strict=True))
    check_leaves(
        held,
        new,
        what,
        "every snapshot needs the same weights. If the model changed on purpose (layers "
        "frozen or unfrozen too), start a new average.",
    )
    return new


def leaves_of(variables: Sequence[Variable]) -> dict[str, Leaf]:
    """What an average knows of variables, by path; a path that stands there twice is numbered."""
    leaves: dict[str, Leaf] = {}
    for variable in variables:
        path, number = variable.path, 2
        while path in leaves:  # two layers may have the same name
            path, number = f"{variable.path}#{number}", number + 1
        leaves[path] = Leaf(tuple(variable.shape), wide_dtype(variable))
    return leaves
