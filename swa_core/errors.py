"""The errors of swa-core: what was wrong, where, and what to do."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One thing wrong with a configuration: where it stands, and what to do about it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class SWAError(Exception):
    """Everything that swa-core and its adapters raise on purpose.

    >>> print(SWAError("the average is empty", hint="train past the first snapshot."))
    the average is empty
    Hint: train past the first snapshot.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nHint: {hint}")


class ConfigError(SWAError, ValueError):
    """A configuration that cannot be used; ``faults`` lists everything wrong with it.

    >>> print(ConfigError([Fault("swa.every", "must not be empty")], source="swa.toml"))
    1 fault in swa.toml
      swa.every: must not be empty
    """

    def __init__(self, faults: list[Fault], *, source: str = "SWAConfig") -> None:
        self.faults = tuple(faults)
        self.source = source
        number = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
        super().__init__("\n  ".join([f"{number} in {source}", *map(str, faults)]))

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself an exception is pickled (on its way from a worker process, say) by its printed
        # message, which the constructor here does not take.
        make = functools.partial(type(self), source=self.source)
        return make, (list(self.faults),), self.__dict__


class StructureError(SWAError, ValueError):
    """Weights whose structure, shapes or dtypes differ from what the average holds."""


class StateError(SWAError, ValueError):
    """A saved state that cannot be loaded: truncated, newer, or of another training."""


class NothingAveragedError(SWAError, RuntimeError):
    """The average was asked for in earnest (``finalize``) before the first snapshot."""


class SwappedError(SWAError, RuntimeError):
    """Something that needs the training weights was done while the average stood in for them."""


class BatchNormError(SWAError, ValueError):
    """Batch-norm statistics could not be recomputed (an empty loader, for example)."""


class NonFiniteStatisticsError(BatchNormError):
    """Batch-norm statistics would hold NaN or Inf: the weights overflow on this data."""


class GeometryError(SWAError, ValueError):
    """Weights that span no line or plane, or hold NaN: there is nothing to walk along."""


class SWAWarning(UserWarning):
    """The category of every warning of swa-core and its adapters."""
