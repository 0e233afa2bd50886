"""The example that takes a real training through three frameworks does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swa_core import load_average

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_networks_of_three_frameworks_predict_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import data as data_sets
    import move_average

    digits = data_sets.load("digits")
    digits = digits._replace(train_x=digits.train_x[:320], train_y=digits.train_y[:320])
    logits = move_average.move(digits, 1, tmp_path)
    state = load_average(tmp_path / move_average.AVERAGE).state
    # Ten updates in each framework, the first snapshot after 8 of the 30.
    assert (state.updates, state.n_averaged) == (30, 5)
    assert logits.keys() == {"torch", "jax", "keras"}
    for found in logits.values():
        np.testing.assert_allclose(found, logits["torch"], rtol=1e-3, atol=2e-3)
    assert np.ptp(logits["torch"]) > 1  # and they are no constant
