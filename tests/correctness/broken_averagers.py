"""An averager in numpy that answers every question rightly, and can be broken in one way each."""

from __future__ import annotations

import contextlib
import pickle

import ml_dtypes
import numpy as np
from correctness.peer import Outcome, Statistics, SteppedPeer, Training
from correctness.rules import UNIFORM
from correctness.scripts import batches, pooled_statistics


class NumpyTraining(Training):
    """Keeps a mean of all weights in float64 beside the weights.

    Args:
      flaw: what is wrong with it, "" for nothing.
    """

    def __init__(self, script, intent=None, *, compiled=False, flaw=""):
        self.script, self.intent, self.compiled, self.flaw = script, intent, compiled, flaw
        self.weights = self._at(0)
        self.average = {name: value * 0.0 for name, value in self.weights.items()}
        if flaw == "begins at zero":
            self.average = {name: value + 0.0 for name, value in self.average.items()}
        self.n_averaged = 0
        self.count = None if script.counts is None else script.counts[0]
        if flaw == "cannot be pickled":
            self.closure = lambda: None

    def _at(self, update):
        return {name: value.copy() for name, value in self.script.at(update).items()}

    def step(self, update):
        self.weights = self._at(update)
        if self.script.counts is not None:
            count = self.script.counts[update]
            averaged = self.flaw == "averages integers"
            self.count = self.count + (count - self.count) / update if averaged else count
        due = True
        if self.intent is not None:
            begin = self.intent.start + (self.flaw == "counts from zero")
            due = update >= begin and (update - begin) % self.intent.every == 0
        finite = np.isfinite(self.weights["kernel"]).all() or self.flaw == "takes NaN in"
        stands_still = self.compiled and self.flaw == "loses prefixed names"
        if due and finite and not stands_still:
            self._add()
            if self.script.tied and self.flaw == "averages twice":
                self._add(again=True)

    def _add(self, again=False):
        self.n_averaged += not again
        for name, value in self.weights.items():
            mixed = self.average[name] + (value - self.average[name]) / self.n_averaged
            if self.flaw == "keeps bfloat16" and self.script.dtype != "float32":
                mixed = mixed.astype(ml_dtypes.bfloat16).astype(np.float64)
            self.average[name] = mixed
        if self.flaw == "shares memory":
            self.average = self.weights

    def live(self):
        return {name: value.copy() for name, value in self.weights.items()}

    def read(self):
        never = self.n_averaged == 0 and self.flaw != "begins at zero"
        if self.compiled and never:
            return self.script.at(0)
        return self.weights if never else self.average

    def outcome(self):
        average = {name: value.copy() for name, value in self.read().items()}
        tied = None
        if self.script.tied:
            average["tied"] = average["kernel"]
            tied = self.flaw != "unties"
        half = self.flaw == "keeps bfloat16" and self.script.dtype != "float32"
        dtype = "bfloat16" if half else "float64"
        return Outcome(average, dtype, self.live(), count=self.count, tied=tied)

    def save(self):
        count = 1 if self.flaw == "forgets its count" else self.n_averaged
        return pickle.dumps((self.average, count))

    def load(self, saved):
        self.average, self.n_averaged = pickle.loads(saved)

    @contextlib.contextmanager
    def evaluated(self):
        kept, self.weights = self.weights, self.average
        try:
            yield
        except BaseException:
            if self.flaw != "left in by a raise":
                self.weights = kept
            raise
        self.weights = kept
        if self.flaw == "swaps by adding":
            self.weights = {name: value + 1e-9 for name, value in kept.items()}

    def batch_norm(self, inputs):
        mean, var = pooled_statistics(self.average, inputs)
        if self.flaw == "weighs batches equally":
            each = [pooled_statistics(self.average, [batch]) for batch in batches(self.script)]
            mean, var = (np.mean(values, 0) for values in zip(*each, strict=True))
        found = {"mean": mean, "var": var}
        return Statistics(self.average, found, None, biased=True, how="by hand")

    def shares_memory(self):
        return np.shares_memory(self.average["kernel"], self.weights["kernel"])


def averager(flaw=""):
    """The peer, broken in this way."""
    return SteppedPeer(flaw or "right", UNIFORM, NumpyTraining, keywords={"flaw": flaw})
