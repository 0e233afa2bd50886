"""What the user writes: one configuration for every framework."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swa_core import config_files, config_reading
from swa_core.averaging import NonFinite
from swa_core.errors import ConfigError, Fault
from swa_core.learning_rate import LearningRate, LRSchedule
from swa_core.rules import Rule, Uniform
from swa_core.schedule import Schedule
from swa_core.units import MissingLengthError, Time


@dataclass(frozen=True, kw_only=True)
class SWAConfig:
    """When to average, how much each snapshot weighs, and the learning rate meanwhile.

    Times are "75%" (of the training), "160ep" (completed epochs) or "30000step" (updates).

    Attributes:
      start: the first snapshot.
      every: the distance between snapshots.
      stop: the last update that may be a snapshot; None for no end.
      rule: how much each snapshot weighs: ``Uniform()``, ``EMA(decay)``, ``Polynomial(eta)``.
      lr: the learning rate from the start on; None leaves it alone.
      nonfinite: "skip" leaves a snapshot with NaN or Inf out and counts it; "keep" does not look.

    Raises:
      ConfigError: with everything that is wrong, each with its path.

    >>> SWAConfig(start="160ep").schedule(steps_per_epoch=391).first
    62560
    >>> SWAConfig.from_dict({"evry": "1ep", "rule": "exponential"})
    Traceback (most recent call last):
    swa_core.errors.ConfigError: 2 faults in the mapping
      swa.evry: unknown key. Did you mean "every"?
      swa.rule: unknown rule "exponential". Known are uniform, ema, polynomial.
    """

    start: str = "75%"
    every: str = "1ep"
    stop: str | None = None
    rule: Rule = field(default_factory=Uniform)
    lr: LearningRate | None = None
    nonfinite: NonFinite = "skip"

    def __post_init__(self) -> None:
        if faults := config_reading.faults_of(vars(self)):
            raise ConfigError(faults)

    @classmethod
    def of(cls, config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str]) -> SWAConfig:
        """A configuration from whatever an adapter was given: one, a mapping, or a path.

        Raises:
          ConfigError: the mapping or file is faulty; see ``from_dict`` and ``load``.
          OSError: the file cannot be read.
          TypeError: it is none of these.

        >>> SWAConfig.of({"start": "50%"}).start
        '50%'
        """
        if isinstance(config, SWAConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if isinstance(config, (str, os.PathLike)):
            return cls.load(config)
        raise TypeError(
            f"expected a SWAConfig, a mapping or the path of a file, got {type(config).__name__}"
        )

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], *, source: str = "the mapping", path: str = "swa"
    ) -> SWAConfig:
        """Reads the keys of a ``[swa]`` table from any mapping (OmegaConf's, for example).

        Args:
          mapping: the fields, in the form that ``to_dict`` gives.
          source: what to call the mapping in an error.
          path: what to put before its keys in an error.

        Raises:
          ConfigError: with every fault found.
        """
        fields, faults = config_reading.read(mapping, path)
        if faults:
            raise ConfigError(faults, source=source)
        return cls(**fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SWAConfig:
        """Reads ``[swa]`` of a TOML or JSON file, or ``[tool.swa]`` of a pyproject.toml.

        Raises:
          ConfigError: the file holds no such table, or faults in it.
          OSError: the file cannot be read.
        """
        table, key = config_files.read_table(Path(path))
        return cls.from_dict(table, source=Path(path).name, path=key)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain strings, numbers and dicts; ``from_dict`` reads it back.

        Keys that say nothing (``stop`` and ``lr`` when None) are left out.

        >>> SWAConfig(start="50%").to_dict()
        {'start': '50%', 'every': '1ep', 'rule': 'uniform', 'nonfinite': 'skip'}
        """
        return config_reading.write(vars(self))

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes a TOML or JSON file (by its suffix) that ``load`` reads back.

        Raises:
          ConfigError: another suffix, or a file that holds something else stands there.
          OSError: the file cannot be written.
        """
        config_files.write_table(Path(path), self.to_dict())

    def schedule(
        self, *, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Schedule:
        """The snapshots in updates.

        Args:
          steps_per_epoch: updates per epoch: ``len(loader) // accumulation``.
          total_steps: updates in all: ``epochs * steps_per_epoch``.

        Raises:
          ConfigError: a length that the configuration needs is missing, or no snapshot can come.

        >>> SWAConfig(start="75%", every="1ep").schedule(steps_per_epoch=10, total_steps=42)
        Schedule(start=40, every=10, stop=None)
        """
        lengths = _Lengths(steps_per_epoch, total_steps)
        schedule = self._schedule(lengths)
        lengths.raise_faults()
        assert schedule is not None
        return schedule

    def lr_schedule(
        self, *, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> LRSchedule | None:
        """The learning rate of ``[swa.lr]`` in updates, or None where there is none.

        It counts from the first snapshot, also where ``start`` is 0.

        Args:
          steps_per_epoch: as for ``schedule``.
          total_steps: as for ``schedule``.

        Raises:
          ConfigError: as ``schedule``, and where ``every`` is no multiple of ``cycle``.

        >>> config = SWAConfig(start="2ep", lr=LearningRate(value=0.05, anneal="1ep"))
        >>> config.lr_schedule(steps_per_epoch=10)
        LRSchedule(start=20, value=0.05, anneal=10, shape='cosine', cycle=None, low=None)
        """
        lengths = _Lengths(steps_per_epoch, total_steps)
        schedule = self._schedule(lengths)
        lr = self.lr
        anneal = lengths.updates("lr.anneal", lr.anneal) if lr else None
        cycle = lengths.updates("lr.cycle", lr.cycle) if lr else None
        if lr and schedule and cycle and schedule.every % cycle:
            lengths.fault(
                "lr.cycle",
                f"{lr.cycle} is {cycle} updates, and swa.every ({schedule.every}) is no multiple "
                "of it, so snapshots would miss the low end of the cycles. Make swa.every a whole "
                "number of cycles.",
            )
        lengths.raise_faults()
        if lr is None:
            return None
        assert schedule is not None
        return LRSchedule(schedule.start, lr.value, anneal or 0, lr.shape, cycle, lr.low)

    def _schedule(self, lengths: _Lengths) -> Schedule | None:
        """The schedule; None if lengths are missing, with a fault for each."""
        whole_epochs = Time.parse(self.every).unit == "ep"
        start = lengths.updates("start", self.start, whole_epochs=whole_epochs)
        every = lengths.updates("every", self.every)
        stop = lengths.updates("stop", self.stop, whole_epochs=whole_epochs)
        if start is None or every is None or (stop is None and self.stop is not None):
            return None
        schedule = Schedule(start or every, every, stop)
        said = f"the first snapshot at {schedule.first} (start {self.start}, every {self.every})"
        if stop is not None and schedule.first > stop:
            lengths.fault(
                "stop",
                f"{self.stop} is update {stop}, before {said}. Stop later or start sooner.",
            )
        total_steps = lengths.known["total_steps"]
        if total_steps is not None and schedule.first > total_steps:
            lengths.fault(
                "start",
                f"the training ends at update {total_steps}, before {said}. Start sooner.",
            )
        return schedule


class _Lengths:
    """The lengths of one training, and what the configuration asks of them in vain."""

    def __init__(self, steps_per_epoch: int | None, total_steps: int | None) -> None:
        self.faults: list[Fault] = []
        self.known = {
            "steps_per_epoch": self._whole("steps_per_epoch", steps_per_epoch),
            "total_steps": self._whole("total_steps", total_steps),
        }
        self.raise_faults()

    def _whole(self, name: str, value: Any) -> int | None:
        if value is None:
            return None
        try:
            # Not only ints: len() of a loader may come as numpy's or a framework's integer.
            whole = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
        except TypeError:
            whole = 0
        if whole < 1:
            message = f"expected a whole number of updates >= 1, got {value!r}."
            self.faults.append(Fault(name, message))
        return whole

    def updates(self, key: str, text: str | None, *, whole_epochs: bool = False) -> int | None:
        if text is None:
            return None
        try:
            return Time.parse(text).updates(**self.known, whole_epochs=whole_epochs)
        except MissingLengthError as missing:
            self.fault(key, f"{text} {missing}")
            return None

    def fault(self, key: str, message: str) -> None:
        self.faults.append(Fault(f"swa.{key}", message))

    def raise_faults(self) -> None:
        if self.faults:
            raise ConfigError(self.faults, source="the schedule")
