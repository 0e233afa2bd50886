"""``swa_core``: the state machine on trees of numpy arrays, without a framework."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np

from correctness.cells import NotApplicableError
from correctness.peer import Outcome, SteppedPeer, Training, Tree
from correctness.rules import UNIFORM
from correctness.scripts import Intent, Script
from swa_core import SWAConfig, init, update


def as_dtype(name: str) -> np.dtype:
    """A dtype by its name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class CoreTraining(Training):
    """``update`` after each update of the weights, which are a dictionary."""

    def __init__(
        self, script: Script, intent: Intent | None = None, *, compiled: bool = False
    ) -> None:
        if compiled:
            raise NotApplicableError("knows no names")
        self.script = script
        config = {"start": "1step", "every": "1step"}
        if intent is not None:
            config = {"start": f"{intent.start}step", "every": f"{intent.every}step"}
        self.config = SWAConfig.from_dict(config)
        self.schedule = self.config.schedule()
        self.weights = self._at(0)
        self.state = init(self.weights)

    def _at(self, number: int) -> dict:
        dtype = as_dtype(self.script.dtype)
        weights = {name: value.astype(dtype) for name, value in self.script.at(number).items()}
        if self.script.counts is not None:
            weights["count"] = np.int64(self.script.counts[number])
        if self.script.tied:
            weights["tied"] = weights["kernel"]
        return weights

    def step(self, number: int) -> None:
        self.weights = self._at(number)
        self.state = update(self.state, self.weights, self.schedule, self.config.rule)

    def live(self) -> Tree:
        return {name: np.float64(self.weights[name]) for name in ("kernel", "bias")}

    def outcome(self) -> Outcome:
        average = {
            name: np.float64(value)
            for name, value in self.state.average.items()
            if value is not None
        }
        outcome = Outcome(average, str(self.state.average["kernel"].dtype), self.live())
        if self.script.counts is not None:
            assert self.state.average["count"] is None
            outcome.count = float(self.weights["count"])  # not averaged: the live one is read
        return outcome

    def save(self) -> bytes:
        return pickle.dumps(self.state)

    def load(self, saved: bytes) -> None:
        self.state = pickle.loads(saved)

    def shares_memory(self) -> bool:
        return any(
            np.shares_memory(self.state.average[name], self.weights[name])
            for name in ("kernel", "bias")
        )

    def __deepcopy__(self, memo: dict) -> CoreTraining:
        twin = copy.copy(self)
        twin.state, twin.weights = copy.deepcopy((self.state, self.weights), memo)
        return twin


PEERS = [SteppedPeer("swa_core", UNIFORM, CoreTraining, copies=False)]
