"""A small training with its visited weights, for parameters of any kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_core import SWAConfig
from swa_optax import swa

CONFIG = SWAConfig(start="3step", every="2step")
UPDATES = 8
SNAPSHOTS = (3, 5, 7)


def data(features=3, rows=8):
    rng = np.random.default_rng(0)
    return jnp.float32(rng.standard_normal((rows, features))), jnp.float32(rng.random((rows, 1)))


def train(params, loss, *batch):
    """The optimizer state and the last parameters, and copies of those after each update."""
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa(CONFIG))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss, allow_int=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, visited = tx.init(params), []
    for _ in range(UPDATES):
        params, state = step(params, state)
        visited.append(copied(params))
    return state, params, visited


def copied(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def mean(visited):
    """Of the snapshots' leaves, in float64."""
    of_snapshots = [visited[update - 1] for update in SNAPSHOTS]
    return [np.mean(np.float64(leaf), axis=0) for leaf in zip(*of_snapshots, strict=True)]


def assert_is_mean(averaged, params, visited):
    """The average is that of the snapshots, in the containers and dtypes of the parameters."""
    assert jax.tree.structure(averaged) == jax.tree.structure(params)
    assert type(averaged) is type(params)
    leaves = zip(jax.tree.leaves(averaged), jax.tree.leaves(params), mean(visited), strict=True)
    for got, live, expected in leaves:
        assert got.dtype == live.dtype
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)
