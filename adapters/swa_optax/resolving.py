"""The configuration in updates, as values that are known when a function is traced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from swa_core import ConfigError, Schedule, SWAConfig
from swa_core.errors import Fault

Config = SWAConfig | Mapping[str, Any] | str | os.PathLike[str]

# Updates are counted in int32, as optax counts, and stay at its end.
LAST_UPDATE = int(np.iinfo(np.int32).max)


def resolve(
    config: Config, steps_per_epoch: int | None, total_steps: int | None
) -> tuple[SWAConfig, Schedule]:
    """The configuration, and its snapshots in updates.

    Args:
      config: a configuration, a mapping or the path of a file.
      steps_per_epoch: updates per epoch, a number that is known when tracing.
      total_steps: updates in all, likewise.

    Raises:
      ConfigError: faults in the configuration; a length is missing or traced; a time is later
        than an int32 counter reaches.
    """
    lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    if traced := [name for name, value in lengths.items() if isinstance(value, jax.core.Tracer)]:
        message = (
            "is traced, but the schedule is made when the function is compiled. Pass a Python "
            "int: keep it out of the arguments of jit (static_argnames), and name it in "
            "static_args of optax.inject_hyperparams."
        )
        raise ConfigError([Fault(name, message) for name in traced], source="the schedule")
    config = SWAConfig.of(config)
    schedule = config.schedule(**lengths)
    late = [
        Fault(f"swa.{name}", f"update {value} is later than JAX's int32 counters reach.")
        for name, value in schedule._asdict().items()
        if value is not None and value > LAST_UPDATE
    ]
    if late:
        raise ConfigError(late, source="the schedule")
    return config, schedule
