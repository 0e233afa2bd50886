"""``swa`` behind each optimizer of optax and optax.contrib: it changes nothing, and averages."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from adapter_optax.optimizers import BESIDES, OPTIMIZERS, training, unlisted
from adapter_optax.training import same_bits

from swa_core import SWAConfig, SWAState
from swa_optax import averaged_params, n_averaged, swa

# Without a look for NaN there is half as much to compile.
EVERY = SWAConfig(start="1step", every="1step", nonfinite="keep")
pytestmark = pytest.mark.usefixtures("relaxed_jax")


def test_none_is_overlooked():
    assert unlisted() == set()
    assert not BESIDES.keys() & OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_behind(name):
    optimizer = OPTIMIZERS[name]()
    tx = optax.chain(optimizer, swa(EVERY))
    plain, _, compilations = training(optimizer, name)(2)
    seen, state, ours = training(tx, name)(2)
    same_bits(seen, plain)  # the updates of every step, and the parameters
    assert ours == compilations, "it compiles once more than without averaging"
    assert n_averaged(state) == 2
    expected = np.mean(np.float64([w for _, w in seen]), axis=0)
    np.testing.assert_allclose(averaged_params(state, seen[-1][1]), expected, rtol=1e-6)
    for field in SWAState._fields:  # a name that no other state has
        assert optax.tree.get(state, field) is getattr(state[-1], field)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    same_bits(mapped[-1].average, state[-1].average + 1)
    assert jax.tree.map(jax.typeof, tx.init(seen[-1][1])[-1]) == jax.tree.map(jax.typeof, state[-1])
