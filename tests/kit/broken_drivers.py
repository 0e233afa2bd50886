"""Drivers that are wrong in one way each: what the kit's checks must reject.

Each does what some real implementation was seen to do.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import numpy as np

from swa_core.averaging import update
from swa_core.errors import NothingAveragedError, StructureError, SWAWarning
from swa_core.testing import CoreDriver


class IgnoresStop(CoreDriver):
    def start(self, *args, **kwargs):
        super().start(*args, **kwargs)
        self.schedule = self.schedule._replace(stop=None)


class CountsFromZero(CoreDriver):
    """Takes each snapshot one update late, as a counter does to which the first update is 0."""

    def start(self, *args, **kwargs):
        super().start(*args, **kwargs)
        self.schedule = self.schedule._replace(start=self.schedule.start + 1)


class RoundsTheLastBit(CoreDriver):
    """Adds what its own rounding leaves over: fine for precision, not for bit-for-bit."""

    def average(self):
        average = super().average()
        if self.state.n_averaged < 5:
            return average
        return {name: np.nextafter(leaf, np.float32(np.inf)) for name, leaf in average.items()}


class Float32Recurrence(CoreDriver):
    def start(self, *args, **kwargs):
        super().start(*args, **kwargs)
        self.total = np.float32(0)

    def train(self, weights):
        n = self.state.n_averaged
        super().train(weights)
        if self.state.n_averaged > n:
            retain = np.float32(self.config.rule.retain(np.float32(max(n, 1))))
            self.total = retain * self.total + np.float32(1)
            self.state = self.state._replace(total=float(self.total))

    def load(self, saved):
        super().load(saved)
        self.total = np.float32(self.state.total)


class LerpsFromTheStart(CoreDriver):
    """Mixes the first snapshot into the initial weights with weight 1 instead of copying it."""

    def train(self, weights):
        before = self.state
        super().train(weights)
        if self.state.n_averaged == 1 and before.n_averaged == 0:
            mixed = {
                name: old + np.float32(1) * (self.state.average[name] - old)
                for name, old in before.average.items()
                if old is not None
            }
            self.state = self.state._replace(average=self.state.average | mixed)


class HandsOutItsArrays(CoreDriver):
    """Reads without a copy, and averages in place."""

    def train(self, weights):
        held = dict(self.state.average)
        super().train(weights)
        for name, leaf in self.state.average.items():
            if leaf is not None and held[name].shape == leaf.shape:
                held[name][...] = leaf
        self.state = self.state._replace(average=held)

    def average(self):
        if not self.state.n_averaged:
            return super().average()
        held = {name: leaf for name, leaf in self.state.average.items() if leaf is not None}
        return held | self.aliases(held)


class AliasesTheWeights(CoreDriver):
    """Keeps the live array as its first average; the training then writes into it."""

    def train(self, weights):
        live = dict(self.live)
        super().train(weights)
        for name, leaf in live.items():
            if name in self.live and leaf.shape == self.live[name].shape and leaf.ndim:
                leaf[...] = self.live[name]
                self.live[name] = leaf
        if self.state.n_averaged == 1 and self.state.n_updates % 2 == 0:
            alias = {
                name: self.live[name] if leaf is not None and leaf.dtype == np.float32 else leaf
                for name, leaf in self.state.average.items()
            }
            self.state = self.state._replace(average=alias)


class ForgetsToRestoreOnARaise(CoreDriver):
    @contextlib.contextmanager
    def averaged(self):
        self.average()
        self.swapped = True
        yield
        self.swapped = False


class StoresOverTheWeights(CoreDriver):
    """Swaps by adding and subtracting, which does not bring back the same bits."""

    @contextlib.contextmanager
    def averaged(self):
        with super().averaged():
            yield
        if self.state.n_averaged:
            self.live = {
                name: (leaf - average) + average if leaf.dtype.kind == "f" else leaf
                for name, leaf in self.live.items()
                for average in [np.float32(1e6)]
            }


class WarnsEveryTime(CoreDriver):
    def average(self):
        self.warned = False
        return super().average()


class ReadsZerosAtFirst(CoreDriver):
    def average(self):
        average = super().average()
        if self.state.n_averaged:
            return average
        return {name: np.zeros_like(leaf) for name, leaf in average.items()}


class FinalizesNothing(CoreDriver):
    def finalize(self):
        if not self.state.n_averaged:
            raise NothingAveragedError("finalize() before the first snapshot")


class FinalizesTheStart(CoreDriver):
    """Makes what it has the model's weights, averaged or not."""

    def finalize(self):
        if not self.state.n_averaged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SWAWarning)
                self.live = self.averaged_model()
        else:
            super().finalize()


class TrainsTheAverage(CoreDriver):
    def train(self, weights):
        self.swapped = False
        super().train(weights)


class LosesItsTotal(CoreDriver):
    """Saves the counters and the average, and mixes on as if the rule were uniform."""

    def load(self, saved):
        super().load(saved)
        self.state = self.state._replace(total=float(self.state.n_averaged))


class LosesItsClock(CoreDriver):
    def load(self, saved):
        super().load(saved)
        self.state = self.state._replace(n_updates=2 * self.state.n_averaged)


class SavesTheSwappedWeights(CoreDriver):
    def save(self):
        saved = super().save()
        return saved | {"model": self.weights()}


class AveragesInHalf(CoreDriver):
    """Keeps the average in the dtype of the weights."""

    def train(self, weights):
        super().train(weights)
        narrow = {
            name: leaf.astype(self.live[name].dtype).astype(leaf.dtype)
            if leaf is not None
            else leaf
            for name, leaf in self.state.average.items()
        }
        self.state = self.state._replace(average=narrow)


class AveragesIntegers(CoreDriver):
    """Averages whatever the model holds, and truncates."""

    def averaged_model(self):
        return super().averaged_model() | {
            name: np.zeros_like(leaf) for name, leaf in self.live.items() if leaf.dtype.kind in "ib"
        }


class AveragesTiedTwice(CoreDriver):
    def train(self, weights):
        super().train(weights)
        for name in self.tied.values():
            total = self.state.total
            leaf = self.state.average[name]
            leaf += (self.live[name] - leaf) / np.float32(total)


class AveragesFrozen(CoreDriver):
    def start(self, *args, frozen=(), **kwargs):
        super().start(*args, **kwargs)


class TakesAnyShape(CoreDriver):
    def train(self, weights):
        with contextlib.suppress(StructureError):
            super().train(weights)
            return
        if {name: leaf.dtype for name, leaf in weights.items()} != {
            name: leaf.dtype for name, leaf in self.state.average.items()
        }:
            raise StructureError("another number or dtype")
        self.state = self.state._replace(n_averaged=self.state.n_averaged + 1)


class TakesAnyDtype(CoreDriver):
    def train(self, weights):
        super().train(
            {
                name: leaf.astype(np.float32) if leaf.dtype == np.int32 and leaf.ndim else leaf
                for name, leaf in weights.items()
            }
        )


class TakesAnyNumber(CoreDriver):
    def train(self, weights):
        missing = {name: leaf for name, leaf in self.live.items() if name not in weights}
        super().train(missing | weights)


class CountsWhatItRefuses(CoreDriver):
    def train(self, weights):
        try:
            super().train(weights)
        except StructureError:
            self.state = self.state._replace(n_averaged=self.state.n_averaged + 1)
            raise


class SkipsSilently(CoreDriver):
    def n_skipped(self):
        return 0


class AveragesNaN(CoreDriver):
    def train(self, weights):
        self.live = copy.deepcopy(weights)
        self.state = update(
            self.state, self.trainable(), self.schedule, self.config.rule, nonfinite="keep"
        )


class CountsUpdatesWithNaN(CoreDriver):
    """Looks at the weights of every update, not of snapshots only."""

    def train(self, weights):
        super().train(weights)
        due = self.schedule.is_snapshot(self.state.n_updates)
        finite = all(np.isfinite(leaf).all() for leaf in weights.values() if leaf.dtype.kind == "f")
        if not due and not finite:
            self.state = self.state._replace(n_skipped=self.state.n_skipped + 1)


class NeverKeepsNaN(CoreDriver):
    def start(self, weights, config, **kwargs):
        super().start(weights, config, **kwargs)
        self.config = copy.copy(config)
        object.__setattr__(self.config, "nonfinite", "skip")


class Garbage(CoreDriver):
    """Returns noise: the kit must not be fooled by a comparison thrown away."""

    def average(self):
        average = super().average()
        rng = np.random.default_rng()
        return {name: rng.random(leaf.shape, np.float32) for name, leaf in average.items()}
