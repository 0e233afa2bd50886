"""The numpy state machine behind a driver: the shortest example, and what the kit compares with."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from swa_core.averaging import SWAState, init, update
from swa_core.config import SWAConfig
from swa_core.errors import NothingAveragedError, SwappedError, SWAWarning
from swa_core.saving import state_from_dict, state_to_dict
from swa_core.testing.driver import Weights


class CoreDriver:
    """``swa_core.init`` and ``update`` driven by script; the model is a dict of arrays.

    >>> driver = CoreDriver()
    >>> driver.start({"w": np.float32([1])}, SWAConfig(start="1step", every="1step"))
    >>> for value in (2, 4):
    ...     driver.train({"w": np.float32([value])})
    >>> driver.average()
    {'w': array([3.], dtype=float32)}
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}

    def start(
        self,
        weights: Weights,
        config: SWAConfig,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        frozen: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.schedule = config.schedule(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self.frozen, self.tied = frozenset(frozen), dict(tied or {})
        self.live = copy.deepcopy(weights)
        self.state: SWAState = init(self.trainable())
        self.swapped = self.warned = False

    def trainable(self) -> Weights:
        """What an optimizer would hold: no frozen weight, and a tied one once."""
        return {
            name: leaf
            for name, leaf in self.live.items()
            if name not in self.frozen and name not in self.tied
        }

    def train(self, weights: Weights) -> None:
        if self.swapped:
            raise SwappedError("an update inside averaged()", hint="leave the context first.")
        self.live = copy.deepcopy(weights)
        self.state = update(
            self.state,
            self.trainable(),
            self.schedule,
            self.config.rule,
            nonfinite=self.config.nonfinite,
        )

    def weights(self) -> Weights:
        return copy.deepcopy(self.averaged_model() if self.swapped else self.live)

    def average(self) -> Weights:
        if not self.state.n_averaged:
            if not self.warned:
                warnings.warn("nothing is averaged yet", SWAWarning, stacklevel=2)
            self.warned = True
            return copy.deepcopy(self.trainable() | self.aliases(self.live))
        average = {name: leaf for name, leaf in self.state.average.items() if leaf is not None}
        return copy.deepcopy(average | self.aliases(average))

    def aliases(self, weights: Weights) -> Weights:
        """The second names of tied weights."""
        return {alias: weights[name] for alias, name in self.tied.items()}

    def averaged_model(self) -> Weights:
        """The model's weights with the average in place of those that are averaged."""
        return {
            name: np.asarray(self.average().get(name, leaf)).astype(leaf.dtype)
            for name, leaf in self.live.items()
        }

    def n_averaged(self) -> int:
        return self.state.n_averaged

    def n_skipped(self) -> int:
        return self.state.n_skipped

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        self.average()  # warns when there is none
        self.swapped = True
        try:
            yield
        finally:
            self.swapped = False

    def finalize(self) -> None:
        if not self.state.n_averaged:
            raise NothingAveragedError("finalize() before the first snapshot")
        self.live = self.averaged_model()

    def save(self) -> Any:
        state = state_to_dict(self.state, schedule=self.schedule, rule=self.config.rule)
        return copy.deepcopy({"model": self.live, "swa": state})

    def load(self, saved: Any) -> None:
        self.live = copy.deepcopy(saved["model"])
        self.state = state_from_dict(
            saved["swa"], self.trainable(), schedule=self.schedule, rule=self.config.rule
        )
