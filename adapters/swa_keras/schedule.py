"""The learning rate of ``[swa.lr]`` as a Keras schedule, computed inside the compiled step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from swa_core import ConfigError, LRSchedule, SWAConfig, learning_rate
from swa_core.errors import Fault
from swa_core.numeric import number
from swa_keras.backend import wide

_REMEDY = "a float, or a keras.optimizers.schedules.LearningRateSchedule"


@keras.saving.register_keras_serializable(package="swa_keras")
class SWASchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The base learning rate up to the start of the averaging, from there on that of ``[swa.lr]``.

    Keras asks a schedule for the rate of the first update with step 0, so the answer to ``step``
    is the rate that makes update ``step + 1``. It departs from the rate that made update
    ``start``. With gradient accumulation Keras counts the batches instead; the base schedule is
    asked with what Keras counts, as it would be without this one.

    Args:
      base: a rate, or a schedule.
      config: a ``SWAConfig``, a mapping of its fields, or the path of a file with ``[swa]``.
      steps_per_epoch: updates per epoch, where the configuration counts epochs.
      total_steps: updates in all, where it has percentages.
      gradient_accumulation_steps: that of the optimizer, if it has any: batches per update.

    Attributes:
      lr: the resolved ``[swa.lr]`` in updates; None without one, and then the rate is the base's.

    Raises:
      ConfigError: faults in the configuration; a length is missing.
      TypeError: ``base`` is neither a number nor a schedule.

    Source:
      The cyclical rate: Izmailov et al. 2018, arXiv:1803.05407, sec. 3.1.

    >>> config = {"start": "2step", "every": "1step",
    ...           "lr": {"value": 0.05, "anneal": "2step", "shape": "linear"}}
    >>> rate = SWASchedule(0.1, config)
    >>> [round(float(rate(step)), 3) for step in range(5)]
    [0.1, 0.1, 0.075, 0.05, 0.05]
    """

    def __init__(
        self,
        base: float | keras.optimizers.schedules.LearningRateSchedule,
        config: SWAConfig | Mapping[str, Any] | str | os.PathLike[str],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        gradient_accumulation_steps: int | None = None,
    ) -> None:
        if not isinstance(base, keras.optimizers.schedules.LearningRateSchedule):
            rate = number(base)
            if rate is None:
                raise TypeError(f"the base rate must be {_REMEDY}, got {base!r}")
            base = rate
        self.base = base
        self.config = SWAConfig.of(config)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.gradient_accumulation_steps = _whole(gradient_accumulation_steps)
        self.lr: LRSchedule | None = self.config.lr_schedule(
            steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )

    def __call__(self, step: Any) -> Any:
        """The rate of the update that ``step`` completed ones (or batches) come before.

        Args:
          step: what Keras calls iterations [batches, >= 0]; an int or a scalar integer tensor.
        """
        dtype = wide(keras.config.floatx())
        if self.lr is None:
            return keras.ops.cast(self._base(step), dtype)
        batches = self.gradient_accumulation_steps or 1
        step = keras.ops.convert_to_tensor(step)
        # At the base's own rate up to the last batch of update `start`, and no further.
        base = self._base(keras.ops.minimum(step, self.lr.start * batches - 1))
        since = step // batches + 1 - self.lr.start
        # Brought into a range that float32 counts exactly, however long the training is.
        if self.lr.cycle is not None:
            since = keras.ops.where(since > 0, (since - 1) % self.lr.cycle + 1, 0)
        else:
            since = keras.ops.clip(since, 0, max(self.lr.anneal, 1))
        return learning_rate(
            keras.ops.cast(since, dtype),
            keras.ops.cast(base, dtype),
            self.lr._replace(start=0),
            xp=keras.ops,
        )

    def _base(self, step: Any) -> Any:
        return self.base if isinstance(self.base, float) else self.base(step)

    def get_config(self) -> dict[str, Any]:
        """The arguments as plain values, for ``from_config``."""
        base = self.base
        return {
            "base": base if isinstance(base, float) else keras.optimizers.schedules.serialize(base),
            "config": self.config.to_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SWASchedule:
        """The schedule that ``get_config`` described."""
        config = dict(config)
        base, swa = config.pop("base"), config.pop("config")
        if isinstance(base, dict):
            base = keras.optimizers.schedules.deserialize(base)
        return cls(base, swa, **config)


def _whole(steps: Any) -> int | None:
    if steps is None:
        return None
    value = number(steps)
    if value is None or value < 1 or value != int(value):
        raise ConfigError(
            [
                Fault(
                    "gradient_accumulation_steps",
                    f"expected a whole number of batches >= 1, got {steps!r}.",
                )
            ],
            source="SWASchedule(...)",
        )
    return int(value)
