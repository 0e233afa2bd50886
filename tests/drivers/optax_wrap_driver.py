"""``swa_optax.wrap`` driven by script."""

from __future__ import annotations

import optax

import swa_optax
from drivers.optax_driver import OptaxDriver, freezing


class OptaxWrapDriver(OptaxDriver):
    @staticmethod
    def optimizer(config, frozen, **lengths):
        tx = swa_optax.wrap(optax.sgd(1.0), config, **lengths)
        return freezing(tx, frozen) if frozen else tx
