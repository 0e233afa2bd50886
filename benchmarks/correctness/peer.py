"""What a peer must be able to do to be asked questions; who cannot, says why."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from correctness.cells import NotApplicableError
from correctness.rules import Rule
from correctness.scripts import Array, Intent, Script

Tree = Mapping[str, Array]


@dataclass
class Outcome:
    """What a training came to; arrays are float64 copies on the host.

    Attributes:
      average: what the averager holds, by the names of the weights, in its own precision.
      dtype: of that average.
      live: the weights of the training itself.
      trajectory: the weights after each update, initial ones first, where the peer's training leads
        to others than the script's in the last bit; None if it is the script's.
      count: the integer buffer in the model that is evaluated, None for who has none.
      tied: whether both names of tied weights are one array in the model that is evaluated.
    """

    average: Tree
    dtype: str
    live: Tree
    trajectory: Tree | None = None
    count: float | None = None
    tied: bool | None = None


@dataclass
class Swap:
    """The model's weights before the average was swapped in, meanwhile, and after."""

    before: Tree
    during: Tree
    after: Tree


@dataclass
class Statistics:
    """Batch norm in the model that is evaluated.

    Attributes:
      weights: of that model, kernel and bias.
      found: "mean" and "var".
      training: the same of the model in training, None where it is the model that is evaluated.
      biased: whether the framework keeps the biased variance.
      how: what recomputed them, "" for nothing.
    """

    weights: Tree
    found: Tree
    training: Tree | None
    biased: bool
    how: str


class Peer:
    """One way to average. Subclasses answer what they can.

    Attributes:
      name: its row in the tables.
      rule: what its average should be.
    """

    name: str
    rule: Rule

    def train(self, script: Script, intent: Intent | None = None) -> Outcome:
        """A training from begin to end, every update a snapshot if there is no intent."""
        raise NotImplementedError

    def resumed(self, script: Script, cut: int) -> Outcome:
        """The same, saved after ``cut`` updates and gone on with from what was saved alone."""
        raise NotApplicableError("nothing to save")

    def copied(self, script: Script, cut: int, way: str) -> Outcome:
        """The same, gone on with from a copy ("deepcopy", "pickle") of everything after ``cut``."""
        raise NotApplicableError("runs inside a loop of the package")

    def swapped(self, script: Script, *, raising: bool) -> Swap:
        """The average swapped in and out after a training, by the peer's own means."""
        raise NotApplicableError("nothing is swapped")

    def batch_norm(self, script: Script, inputs: list[Array]) -> Statistics:
        """The model with the average in it, its statistics recomputed if the peer can."""
        raise NotApplicableError("knows of weights alone")

    def memory(self, script: Script) -> dict[str, bool]:
        """Whether average and weights share memory: "when made", "after an update"."""
        raise NotApplicableError("copies come out")

    def renamed(self, script: Script) -> Outcome:
        """A training of the compiled model, whose names have a prefix."""
        raise NotApplicableError("knows no names")


class RaisedWhileSwappedError(Exception):
    """Raised by ourselves inside a swap."""


class Training:
    """A training that is driven update by update; what ``SteppedPeer`` needs of it."""

    def step(self, update: int) -> None:
        """Update number ``update`` (the first is 1), and the snapshot if one is due."""
        raise NotImplementedError

    def outcome(self) -> Outcome:
        """What it came to so far."""
        raise NotImplementedError

    def live(self) -> Tree:
        """The weights as they are in the training."""
        raise NotImplementedError

    def save(self) -> bytes:
        """Everything that the documentation says to save."""
        raise NotApplicableError("nothing to save")

    def load(self, saved: bytes) -> None:
        """Into a training that has just been built."""
        raise NotImplementedError

    def evaluated(self) -> contextlib.AbstractContextManager[Any]:
        """The peer's own way to evaluate on the average, as its documentation writes it."""
        raise NotApplicableError("nothing is swapped")

    def batch_norm(self, inputs: list[Array]) -> Statistics:
        """See ``Peer.batch_norm``."""
        raise NotApplicableError("knows of weights alone")

    def shares_memory(self) -> bool:
        """Whether the average and the weights do."""
        raise NotApplicableError("copies come out")


@dataclass
class SteppedPeer(Peer):
    """A peer whose trainings are loops of ours.

    Attributes:
      name: its row in the tables.
      rule: what its average should be.
      build: a training of a script; keywords ``intent`` and ``compiled``.
      exact: whether updates lead to the script's weights bit for bit.
    """

    name: str
    rule: Rule
    build: Callable[..., Training]
    exact: bool = True
    copies: bool = True
    keywords: dict[str, Any] = field(default_factory=dict)

    def train(self, script: Script, intent: Intent | None = None) -> Outcome:
        training = self.build(script, intent=intent, **self.keywords)
        trajectory = [training.live()] if not self.exact else []
        for update in range(1, script.updates + 1):
            training.step(update)
            if not self.exact:
                trajectory.append(training.live())
        outcome = training.outcome()
        if not self.exact:
            outcome.trajectory = {
                name: [weights[name] for weights in trajectory] for name in trajectory[0]
            }
        return outcome

    def resumed(self, script: Script, cut: int) -> Outcome:
        first = self.build(script, **self.keywords)
        for update in range(1, cut + 1):
            first.step(update)
        saved = first.save()
        del first
        second = self.build(script, **self.keywords)
        second.load(saved)
        for update in range(cut + 1, script.updates + 1):
            second.step(update)
        return second.outcome()

    def copied(self, script: Script, cut: int, way: str) -> Outcome:
        if not self.copies:
            raise NotApplicableError("its state is a tree of arrays")
        training = self.build(script, **self.keywords)
        for update in range(1, cut + 1):
            training.step(update)
        copier = {"deepcopy": copy.deepcopy, "pickle": lambda it: pickle.loads(pickle.dumps(it))}
        training = copier[way](training)
        for update in range(cut + 1, script.updates + 1):
            training.step(update)
        return training.outcome()

    def swapped(self, script: Script, *, raising: bool) -> Swap:
        training = self._trained(script)
        before, during = training.live(), {}
        with contextlib.suppress(RaisedWhileSwappedError), training.evaluated():
            during = training.live()
            if raising:
                raise RaisedWhileSwappedError
        return Swap(before, during, training.live())

    def batch_norm(self, script: Script, inputs: list[Array]) -> Statistics:
        return self._trained(script).batch_norm(inputs)

    def memory(self, script: Script) -> dict[str, bool]:
        training = self.build(script, **self.keywords)
        found = {"when made": training.shares_memory()}
        training.step(1)
        return found | {"after an update": training.shares_memory()}

    def renamed(self, script: Script) -> Outcome:
        training = self.build(script, compiled=True, **self.keywords)
        for update in range(1, script.updates + 1):
            training.step(update)
        return training.outcome()

    def _trained(self, script: Script) -> Training:
        training = self.build(script, **self.keywords)
        for update in range(1, script.updates + 1):
            training.step(update)
        return training


@contextlib.contextmanager
def in_and_out(swap_in: Callable[[], object], swap_out: Callable[[], object]) -> Iterator[None]:
    """Two calls around an evaluation, as who offers no more than the two has it written.

    There is no ``finally``: that would be our remedy, not theirs.
    """
    swap_in()
    yield
    swap_out()
