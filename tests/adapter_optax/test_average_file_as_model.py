"""A saved average, read with safetensors alone, is put into a model of flax."""

from __future__ import annotations

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx
from flax.traverse_util import unflatten_dict

from swa_core import SWAConfig
from swa_optax import averaged_params, save_average, swa

CONFIG = SWAConfig(start="2step", every="1step")
X = jnp.ones((2, 3))


def trained(params, loss):
    """The optimizer's state after a few updates."""
    tx = optax.chain(optax.sgd(0.1), swa(CONFIG))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("read", [safetensors.flax.load_file, safetensors.numpy.load_file])
def test_linen(tmp_path, read, relaxed_jax):
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2)(linen.tanh(linen.Dense(4)(x)))

    network = Network()
    params = network.init(jax.random.key(0), X)["params"]
    params, state = trained(params, lambda p: network.apply({"params": p}, X).sum())
    save_average(tmp_path / "average.safetensors", state, CONFIG)
    found = unflatten_dict(read(tmp_path / "average.safetensors"), sep="/")
    expected = network.apply({"params": averaged_params(state, params)}, X)
    np.testing.assert_array_equal(network.apply({"params": found}, X), expected)
    assert not np.allclose(network.apply({"params": params}, X), expected)


def test_nnx(tmp_path, relaxed_jax):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    network = Network(nnx.Rngs(0))
    definition, weights = nnx.split(network, nnx.Param)

    def put(pure):
        held = nnx.clone(weights)
        nnx.replace_by_pure_dict(held, pure)
        return nnx.merge(definition, held)

    params, state = trained(nnx.to_pure_dict(weights), lambda p: put(p)(X).sum())
    save_average(tmp_path / "average.safetensors", state, CONFIG)
    found = unflatten_dict(safetensors.flax.load_file(tmp_path / "average.safetensors"), sep="/")
    expected = put(averaged_params(state, params))(X)
    np.testing.assert_array_equal(put(found)(X), expected)
    assert not np.allclose(put(params)(X), expected)
