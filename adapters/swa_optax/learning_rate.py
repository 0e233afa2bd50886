"""The learning rate of ``[swa.lr]`` as an optax schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from swa_core import learning_rate
from swa_optax.counting import increment
from swa_optax.resolving import Config, resolve


def swa_lr(
    base_schedule: optax.ScalarOrSchedule,
    config: Config,
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> optax.Schedule:
    """The base learning rate up to the start of the averaging, from there on that of ``[swa.lr]``.

    optax asks for the rate of the first update with count 0, so the answer to ``count`` is the
    rate that makes update ``count + 1``. It departs from the rate that made update ``start``.

    Args:
      base_schedule: a rate, or a schedule of the count.
      config: a ``SWAConfig``, a mapping, or the path of a file with a ``[swa]`` table.
      steps_per_epoch: updates per epoch, where the configuration counts epochs.
      total_steps: updates in all, where it has a share of the training.

    Returns:
      A schedule for any optax optimizer, also under ``inject_hyperparams``: count [updates, >= 0;
      int or traced int32] -> rate. Without ``[swa.lr]`` it is the base schedule.

    Raises:
      ConfigError: faults in the configuration; a length is missing, or traced.

    Source:
      The cyclical rate: Izmailov et al. 2018, arXiv:1803.05407, sec. 3.1.

    >>> config = {"start": "2step", "every": "1step",
    ...           "lr": {"value": 0.05, "anneal": "2step", "shape": "linear"}}
    >>> schedule = swa_lr(0.1, config)
    >>> [round(float(schedule(count)), 3) for count in range(5)]
    [0.1, 0.1, 0.075, 0.05, 0.05]
    """
    config, _ = resolve(config, steps_per_epoch, total_steps)
    lr = config.lr_schedule(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    base = base_schedule if callable(base_schedule) else optax.constant_schedule(base_schedule)
    if lr is None:
        return base
    last_at_base = lr.start - 1  # the count that asks for the rate of update ``start``

    def schedule(count: Any) -> jax.Array:
        # The same width for both, so that strict promotion finds nothing to promote.
        rate = jnp.asarray(base(jnp.minimum(count, last_at_base)), dtype=jnp.result_type(float))
        update = increment(count).astype(jnp.result_type(int))
        return learning_rate(update, rate, lr, xp=jnp)

    return schedule
