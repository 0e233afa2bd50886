"""The averages of an optimizer's parameters and all that is counted about them."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Iterator
from sys import modules
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from swa_core import SWAState
from swa_core.config import SWAConfig
from swa_core.errors import (
    NothingAveragedError,
    StructureError,
    SWAError,
    SwappedError,
    SWAWarning,
)
from swa_core.interrupts import uninterrupted
from swa_core.learning_rate import LRSchedule
from swa_core.schedule import Schedule
from swa_torch.checkpointing import MODULE, Caller, caller, may_be_phantom
from swa_torch.cohort import Cohort, Position, is_averaged
from swa_torch.finite import all_finite
from swa_torch.home import Home
from swa_torch.host import Host
from swa_torch.rates import Rates
from swa_torch.scratch import Scratch
from swa_torch.sharding import (
    agreed,
    drop_whole_copies,
    is_sharded,
    like,
    local,
    refuse_pieces,
)
from swa_torch.stepping import Watch, not_traced, untraced, watchers
from swa_torch.swap import Swap

_HINT = (
    "every snapshot needs the same weights. If the model changed on purpose, wrap its optimizer in "
    "a new SWA."
)


class RunningAverage:
    """Counts the updates of one optimizer, whoever makes them, and averages its parameters.

    Everything that changes is kept here, in plain ints and floats and in tensors of its own, so
    that the wrapper around it can be copied, subclassed or replaced by what frameworks put there.

    Attributes:
      updates: completed updates.
      n_averaged: snapshots taken.
      n_skipped: snapshots left out because they held NaN or Inf.
      total: the sum of the snapshots' weights relative to the newest.
      cohorts: the averages, by the snapshot at which their parameters joined.
      rates: what sets the learning rate, or None.
      swap: the exchange under way while the averages stand in the parameters, else None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: SWAConfig,
        schedule: Schedule,
        lr: LRSchedule | None,
        home: Home,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.rule = config.rule
        self.nonfinite = config.nonfinite
        self.rates = None if lr is None else Rates(lr)
        self.home = home
        self.host = None if home.device is None else Host()
        self.scratch = Scratch()
        self.swap: Swap | None = None
        self._has_warned = False
        self._owners = 0
        self._watch: Watch | None = None
        self._is_phantom = False
        for position, parameter in self.positions():
            refuse_pieces(parameter, self.name(position), "cannot average")
        self.reset()

    def reset(self) -> None:
        """As before the first update."""
        if self.host is not None:
            self.host.drop()
        self.updates = self.n_averaged = self.n_skipped = 0
        self.total = 0.0
        self._half_done = ""  # the snapshot that an error has interrupted
        self.scratch.content = None
        self.cohorts: list[Cohort] = []
        self._members: list[list[Tensor]] = []
        self._waiting: list[Tensor] = []
        # The averages are allocated at the first update: not before, because sharding replaces
        # parameters until then; not later, because a checkpoint is loaded into what is there.
        self._due: int | None = 1
        if self.rates is not None:
            self.rates.load([])

    # Counting: the hooks on the optimizer.

    def connect(self, owner: object) -> None:
        """Hooks into the optimizer, once, until ``owner`` and all other owners are gone."""
        self._owners += 1
        weakref.finalize(owner, self._disconnect).atexit = False
        if self._watch is None:
            self._arrive_as_is = untraced(RunningAverage._arrive)
            self._set_rates = untraced(Rates.before_update)
            self._who_calls = untraced(caller)
            self._watch = Watch(self.optimizer, self._before_update, self._after_update)

    def _disconnect(self) -> None:
        self._owners -= 1
        if not self._owners and self._watch is not None:
            self._watch.remove()
            self._watch = None

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        # Hooks do not travel with an optimizer; whoever restores this connects it anew.
        left_out = ("_arrive_as_is", "_set_rates", "_who_calls")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return {**state, "_owners": 0, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A process that was sent this shares its memory with the sender, who averages on.
        for cohort in self.cohorts:
            cohort.averages = [*map(_unshared, cohort.averages)]

    @not_traced
    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._is_phantom = False
        # While its state is empty, which of most optimizers is so once, and cheap to ask.
        if not optimizer.state and MODULE in modules:
            self._is_phantom = (
                may_be_phantom(optimizer.param_groups) and self._who_calls() is not Caller.OTHER
            )
            if self._is_phantom:
                return
        if self.swap is not None:
            raise SwappedError(
                f"step() after update {self.updates} while the average stands in for the weights: "
                "it would train the average.",
                hint="leave the averaged() block first.",
            )
        if self.rates is not None and self.updates + 1 >= self.rates.schedule.start:
            self._set_rates(self.rates, self.updates + 1, optimizer.param_groups)

    @not_traced
    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # All that an update which is no snapshot costs.
        if self._is_phantom:
            if self.swap is not None:
                self.swap.overlook_writes()
            return
        self.updates += 1
        if self.updates == self._due:
            self._arrive_as_is(self)

    def _arrive(self) -> None:
        self.settle()
        self._due = self.schedule.next_after(self.updates)
        if not self.schedule.is_snapshot(self.updates):
            self.join()
            return
        doing = f"cannot add snapshot {self.n_averaged + 1} at update {self.updates}"
        self.join(doing)
        if self.host is not None and self.host.is_needed(self.cohorts):
            agreed = self._agreed if self.nonfinite == "skip" else None
            self.host.begin(self.cohorts, self.rule, self.scratch, doing, agreed)
            return
        with torch.no_grad(), uninterrupted():
            is_taken = self.nonfinite == "keep" or self._agreed(
                all_finite(weights for c in self.cohorts for weights in c.to_check(self.scratch))
            )
            if is_taken:
                self._half_done = doing
                for cohort in self.cohorts:
                    cohort.add_snapshot(self.rule, self.scratch)
            self._count(is_taken)
            self._half_done = ""

    def _agreed(self, is_finite: bool) -> bool:
        """What all ranks say that hold a part of the weights, by what this one says."""
        sharded = [w for cohort in self.cohorts if cohort.is_sharded for w in cohort.parameters]
        return agreed(is_finite, sharded) if sharded else is_finite

    def _count(self, is_taken: bool) -> None:
        if not is_taken:
            self.n_skipped += 1
            return
        if self.n_averaged:
            self.total = float(self.rule.retain(float(self.n_averaged)) * self.total + 1.0)
        else:
            self.total = 1.0
        self.n_averaged += 1

    def settle(self) -> None:
        """Waits for the snapshot that is being averaged on the host, if there is one.

        Raises:
          SWAError: it failed, or one that was averaged here did.
        """
        if self._half_done:
            raise SWAError(
                f"{self._half_done}: averaging failed, so the average cannot be relied on.",
                hint="load an earlier checkpoint.",
            )
        if self.host is not None and self.host.is_busy():
            self._count(self.host.result())

    # The parameters: who is averaged, and whether they still are what they were.

    def join(self, doing: str = "cannot average") -> None:
        """Follows the optimizer's parameters: new trainable ones get an average.

        Args:
          doing: what cannot be done if parameters have changed, the beginning of the message.

        Raises:
          StructureError: parameters are gone, were added to a known group, or have another shape
            or dtype. Nothing is changed then.
        """
        self.settle()
        now = [group["params"] for group in self.optimizer.param_groups]
        if (
            [*map(len, now)] == [*map(len, self._members)]
            and all(map(_are_the_same, now, self._members))
            and all(cohort.is_unchanged() for cohort in self.cohorts)
            and not any(parameter.requires_grad for parameter in self._waiting)
        ):
            return
        if self.updates <= 1 and not self.n_averaged:
            # Whoever saves and loads before the first update (Accelerate, to move the state) had
            # averages allocated, and may have sharded the parameters since. They hold nothing.
            self.cohorts, self._members, self._waiting = [], [], []
        self._check_numbers(doing)
        found = dict(self.positions())
        for position, parameter in found.items():
            refuse_pieces(parameter, self.name(position), doing)
        for cohort in self.cohorts:
            self._check(cohort, found, doing)
        for cohort in self.cohorts:
            cohort.parameters = [found[position] for position in cohort.positions]
            cohort.follow_devices()
        held = {id(parameter) for cohort in self.cohorts for parameter in cohort.parameters}
        others = {
            position: parameter
            for position, parameter in found.items()
            if id(parameter) not in held and is_averaged(parameter)
        }
        new = {position: p for position, p in others.items() if p.requires_grad}
        if new:
            self.cohorts.append(Cohort([*new], [*new.values()], home=self.home))
        self._waiting = [p for p in others.values() if not p.requires_grad]
        self._members = [[*parameters] for parameters in now]

    def positions(self) -> Iterator[tuple[Position, Tensor]]:
        """The optimizer's parameters by position, each once, at its first one."""
        seen: set[int] = set()
        for g, group in enumerate(self.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield Position(g, i), parameter

    def name(self, position: Position) -> str:
        """What to call a parameter in a message: by position, and by name if torch knows it."""
        group = self.optimizer.param_groups[position.group]
        names = group.get("param_names", ())
        name = f" ('{names[position.member]}')" if position.member < len(names) else ""
        return f"parameter {position.member} of group {position.group}{name}"

    def _check_numbers(self, doing: str) -> None:
        groups = self.optimizer.param_groups
        if len(groups) < len(self._members):
            raise StructureError(
                f"{doing}: the optimizer has {len(groups)} parameter groups, but the running "
                f"average holds {len(self._members)}.",
                hint=_HINT,
            )
        for g, (group, members) in enumerate(zip(groups, self._members, strict=False)):
            if len(group["params"]) != len(members):
                raise StructureError(
                    f"{doing}: group {g} has {len(group['params'])} parameters, but the running "
                    f"average holds {len(members)}.",
                    hint=f"{_HINT} New parameters can join through add_param_group().",
                )

    def _check(self, cohort: Cohort, found: dict[Position, Tensor], doing: str) -> None:
        for position, average, dtype in zip(
            cohort.positions, cohort.averages, cohort.dtypes, strict=True
        ):
            if position not in found:
                raise StructureError(
                    f"{doing}: {self.name(position)} is now another one of the optimizer's "
                    "parameters too.",
                    hint=_HINT,
                )
            parameter = found[position]
            if local(parameter).shape != average.shape:
                shard = "a shard of " if is_sharded(parameter) else ""
                raise StructureError(
                    f"{doing}: {self.name(position)} has {shard}shape "
                    f"{tuple(local(parameter).shape)}, but the running average holds "
                    f"{tuple(average.shape)}.",
                    hint=_HINT,
                )
            if parameter.dtype != dtype:
                raise StructureError(
                    f"{doing}: {self.name(position)} has dtype {say_dtype(parameter.dtype)}, but "
                    f"the running average is of {say_dtype(dtype)} weights.",
                    hint=_HINT,
                )

    # Reading, swapping and keeping the average.

    def read(self) -> list[Tensor]:
        """Copies of the averages in the order of the groups, of live weights where there is none.

        Parameters that were taken out of a known group since are still told of.
        """
        now = [group["params"] for group in self.optimizer.param_groups]
        for g, members in enumerate(self._members):
            if g >= len(now) or len(now[g]) != len(members):
                now[g : g + 1] = [members]
        values = self.values()
        places = [
            (Position(g, i), parameter)
            for g, parameters in enumerate(now)
            for i, parameter in enumerate(parameters)
        ]
        # A parameter that stands in the groups twice is averaged at its first place.
        shared = {id(p): values[place] for place, p in reversed(places) if place in values}
        averages = [like(values.get(place, shared.get(id(p), p)), p) for place, p in places]
        return [average.detach().clone() for average in averages]

    def values(self) -> dict[Position, Tensor]:
        """What this rank holds of the averages, by position and wherever they stand now.

        Without a snapshot there is none.
        """
        self.settle()
        held = {
            position: average
            for cohort in self.cohorts
            if cohort.n_averaged
            for position, average in zip(cohort.positions, cohort.averages, strict=True)
        }
        return {**held, **self.swap.averages} if self.swap is not None else held

    def by_identity(self) -> dict[int, Tensor]:
        """What this rank holds of the averages, by the ``id`` of the parameter."""
        values = self.values()
        return {
            id(parameter): values[position]
            for cohort in self.cohorts
            for position, parameter in zip(cohort.positions, cohort.parameters, strict=True)
            if position in values
        }

    def warn_if_empty(self, stacklevel: int) -> None:
        """Says once that what is read are the live weights."""
        self.settle()
        if not self.n_averaged and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"nothing is averaged yet (update {self.updates}, first snapshot at "
                f"{self.schedule.first}): these are the live weights.",
                SWAWarning,
                stacklevel=stacklevel + 1,
            )

    def drop_whole_copies(self, model: torch.nn.Module | None, doing: str) -> None:
        """Before and after the weights change places; see ``sharding``."""
        weights = (weight for cohort in self.cohorts for weight in cohort.parameters)
        drop_whole_copies(model, weights, doing)

    def swap_in(self, doing: str) -> Swap:
        """The averages take the place of the weights.

        Raises:
          SwappedError: they stand there already.
          StructureError: the parameters have changed.
        """
        self.refuse_swapped(doing)
        self.join(doing)
        host = self.host
        room = host.room if host is not None and host.is_needed(self.cohorts) else None
        with uninterrupted():
            self.swap = Swap(self.cohorts, self.scratch, room)
        return self.swap

    def swap_out(self, *, keep: bool = False) -> None:
        """Ends the exchange: the live weights return, or the averages stay for good."""
        assert self.swap is not None
        with uninterrupted():
            was_written = self.swap.keep() if keep else self.swap.undo()
            # Not before: if the return has failed, step() must not train the average.
            self.swap = None
        if was_written:
            result = "" if keep else " the live weights are back, but"
            warnings.warn(
                f"weights were written to while the average stood in for them:{result} the "
                "average now holds what was written.",
                SWAWarning,
                stacklevel=4,
            )

    def refuse_swapped(self, doing: str) -> None:
        """Raises ``SwappedError`` while an average stands in for the weights, this or another's."""
        if self.swap is not None:
            raise SwappedError(
                f"{doing}: the average stands in for the weights already.",
                hint="leave the averaged() block first.",
            )
        self.refuse_another(doing)

    def refuse_another(self, doing: str) -> None:
        """Raises ``SwappedError`` while another SWA's average stands in for the weights."""
        for other in watchers(self.optimizer):
            if isinstance(other, RunningAverage) and other is not self and other.swap is not None:
                raise SwappedError(
                    f"{doing}: the average of another SWA around the same optimizer stands in for "
                    "the weights.",
                    hint="leave its averaged() block first.",
                )

    def refuse_empty(self, doing: str) -> None:
        """Raises ``NothingAveragedError`` before the first snapshot."""
        self.settle()
        if not self.n_averaged:
            skipped = f", {self.n_skipped} left out as not finite" if self.n_skipped else ""
            raise NothingAveragedError(
                f"{doing}: nothing is averaged yet (update {self.updates}, first snapshot at "
                f"{self.schedule.first}{skipped}).",
                hint="train past the first snapshot, or start the average sooner.",
            )

    # Saving and loading.

    def counters(self) -> SWAState:
        """What is counted, in the core's form, without the arrays."""
        self.settle()
        return SWAState(self.updates, self.n_averaged, self.n_skipped, self.total, None)

    def restore(self, counters: dict[str, Any], cohorts: list[Cohort]) -> None:
        """Goes on from saved counters and averages, which fit the parameters."""
        self.reset()
        self.updates, self.n_averaged = counters["n_updates"], counters["n_averaged"]
        self.n_skipped, self.total = counters["n_skipped"], counters["total"]
        self.cohorts = cohorts
        self.join()
        self._due = self.schedule.next_after(self.updates) if self.updates else 1


def _are_the_same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(operator.is_, some, others))


def _unshared(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_shared() else tensor  # type: ignore[no-untyped-call]


def say_dtype(dtype: torch.dtype) -> str:
    """A dtype without the name of its framework."""
    return str(dtype).removeprefix("torch.")
