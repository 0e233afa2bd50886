"""Fed the same scripted weights, all adapters and the core hold the same average, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.keras_driver import KerasDriver
from drivers.optax_driver import OptaxDriver
from drivers.torch_driver import TorchDriver

from swa_core import Schedule, SWAConfig
from swa_core.testing import CoreDriver, scripts

DRIVERS = (CoreDriver, TorchDriver, KerasDriver, OptaxDriver)


@pytest.mark.parametrize("rule", scripts.EXACT_RULES, ids=str)
def test_averages_are_equal_bit_for_bit(rule):
    config = SWAConfig(start="25%", every="1ep", rule=rule)
    lengths = {"steps_per_epoch": 3, "total_steps": 20}
    schedule = config.schedule(**lengths)
    assert schedule == Schedule(6, 3, None)
    runs = [make() for make in DRIVERS]
    for run in runs:
        run.start(scripts.whole(0), config, **lengths)
    for update, weights in enumerate(scripts.exact(rule, schedule, 20), start=1):
        for run in runs:
            run.train(weights)
            assert run.n_averaged() == schedule.n_snapshots(update), type(run).__name__
        if runs[0].n_averaged():
            expected, *others = (run.average() for run in runs)
            for make, average in zip(DRIVERS[1:], others, strict=True):
                for name, leaf in expected.items():
                    assert average[name].dtype == leaf.dtype == np.float32
                    assert average[name].tobytes() == leaf.tobytes(), (make.__name__, update, name)
