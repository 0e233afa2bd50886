"""One seed in one framework: all arms, each computed once and kept."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.arms import Arm, arms
from experiments.cache import Cache
from experiments.images import Images
from experiments.scores import score
from experiments.training import Training

# Each offers a class ``Training``.
FRAMEWORKS = {
    "torch": "experiments.torch_training",
    "keras": "experiments.keras_training",
    "jax": "experiments.jax_training",
}
# The curves of one seed are drawn, from so many test images.
CURVES_SEED, CURVES_IMAGES = 0, 2000
# An arm that takes longer than this is resumed from its last epochs [seconds].
CHECKPOINT_AFTER = 60.0


@dataclass
class Seed:
    """The arms of one seed.

    Attributes:
      images: what is trained on.
      framework: a name in ``FRAMEWORKS``.
      seed: of the initial weights, the order of the images and what is done to them.
      cache: where results and the states between arms are kept.
      progress: called with the number of epochs that are over.
    """

    images: Images
    framework: str
    seed: int
    cache: Cache
    progress: Callable[[int], object]

    def run(self) -> dict[str, dict[str, Any]]:
        """The result of each arm by its name, from the cache where it is there."""
        every = arms(self.images.experiment)
        results = {arm.name: self.cache.load(self._key(arm)) for arm in every}
        missing = self._missing(every, results)
        branched = {arm.after for arm in every}
        for arm in every:
            if arm.name in missing:
                results[arm.name] = self._run_arm(arm, keep=arm.name in branched)
                self.cache.store(self._key(arm), results[arm.name])
            else:
                self.progress(arm.end - arm.begin)
        for name in branched - {None}:  # what all arms are done with
            self._end(name).unlink(missing_ok=True)
        return results

    def _missing(self, every: list[Arm], results: Mapping[str, Any]) -> set[str]:
        """The arms without a result, and those whose last state they need and is not there."""
        missing: set[str] = set()
        for arm in reversed(every):
            needed = any(other.after == arm.name for other in every if other.name in missing)
            if results[arm.name] is None or (needed and not self._end(arm.name).exists()):
                missing.add(arm.name)
        return missing

    def _run_arm(self, arm: Arm, *, keep: bool) -> dict[str, Any]:
        training = self._new_training()
        if arm.after is not None:
            training.restore(_read(self._end(arm.after)))
        training.begin(arm)
        result: dict[str, Any] = {"scores": {}, "curve": {}, "seconds": 0.0}
        epoch, underway = arm.begin, self.cache.path(self._key(arm)).with_suffix(".underway")
        if underway.exists():
            epoch, result, state = _read(underway)
            training.restore(state)
            self.progress(epoch - arm.begin)
        saved = time.monotonic()
        while epoch < arm.end:
            begin = time.monotonic()
            training.epoch(self.images.epoch(self.seed, epoch), epoch)
            result["seconds"] += time.monotonic() - begin
            epoch += 1
            if epoch in arm.looks:
                result["scores"][str(epoch)] = self._look(training, arm)
            if self.seed == CURVES_SEED and arm.looks:
                result["curve"][str(epoch)] = self._glance(training, arm)
            if time.monotonic() - saved > CHECKPOINT_AFTER:
                _write(underway, (epoch, result, training.state(averages=True)))
                saved = time.monotonic()
            self.progress(1)
        passed = arm.begin * self.images.experiment.steps_per_epoch
        result["snapshots"] = {
            name: [passed + update for update in training.snapshots(name)]
            for name, config in arm.averages
            if config.every != "1step"  # which are all
        }
        if keep:
            _write(self._end(arm.name), training.state(averages=False))
        underway.unlink(missing_ok=True)
        return result

    def _look(self, training: Training, arm: Arm) -> dict[str, dict[str, float]]:
        labels = self.images.test_y
        found = {"last": score(training.logits(None, bn=False), labels)}
        for name, _ in arm.averages:
            found[name] = score(training.logits(name, bn=False), labels)
            found[f"{name} + update_bn"] = score(training.logits(name, bn=True), labels)
        return {name: result._asdict() for name, result in found.items()}

    def _glance(self, training: Training, arm: Arm) -> dict[str, float]:
        labels = self.images.test_y[:CURVES_IMAGES]
        found = {"last": training.logits(None, bn=False, images=CURVES_IMAGES)}
        for name, _ in arm.averages:
            if training.snapshots(name):
                found[name] = training.logits(name, bn=True, images=CURVES_IMAGES)
        return {name: 100 - score(logits, labels).accuracy for name, logits in found.items()}

    def _new_training(self) -> Training:
        module = importlib.import_module(FRAMEWORKS[self.framework])
        return module.Training(self.images, self.seed)

    def _key(self, arm: Arm) -> str:
        return self.cache.key(self._about(arm.name))

    def _end(self, name: str) -> Path:
        """Where the state at the end of an arm is."""
        return self.cache.path(self.cache.key(self._about(name))).with_suffix(".end")

    def _about(self, arm: str) -> Mapping[str, Any]:
        about = self.images.experiment.to_dict()
        return {**about, "framework": self.framework, "seed": self.seed, "arm": arm}


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        pickle.dump(content, file)
    part.replace(path)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)
