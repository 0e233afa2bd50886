"""Models of flax linen: a TrainState with statistics and dropout, and a network on real digits."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from swa_core import StateError
from swa_optax import averaged_params, finalize, n_averaged, swa, update_bn

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # flax promotes


class Network(nn.Module):
    """A small convolutional network with batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(16, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.Dense(32)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x)


class State(TrainState):
    batch_stats: dict


NETWORK = Network()
BATCH, EPOCHS = 128, 6


def digits():
    x, y = load_digits(return_X_y=True)
    x = (np.float32(x) / 16).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    return x[train], y[train], x[test], y[test]


@jax.jit
def initial(x):
    return NETWORK.init(jax.random.key(0), x, train=False)


@jax.jit
def step(state, x, y, key):
    def loss(params):
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return each.mean(), changed["batch_stats"]

    grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


@pytest.fixture(scope="module")
def trained():
    x, y, *_ = digits()
    per_epoch = len(x) // BATCH
    tx = optax.chain(
        optax.sgd(0.2, momentum=0.9),
        swa({"start": "3ep", "every": "1ep"}, steps_per_epoch=per_epoch),
    )
    variables = initial(x[:1])
    state = State.create(
        apply_fn=NETWORK.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )
    rng, snapshots = np.random.default_rng(1), []
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(x))
        for start in range(0, per_epoch * BATCH, BATCH):
            rows = order[start : start + BATCH]
            state = step(state, x[rows], y[rows], jax.random.key(2))
        if epoch >= 3:
            snapshots.append(jax.tree.map(np.array, state.params))
    return state, snapshots


@jax.jit
def accuracy(params, batch_stats, x, y):
    variables = {"params": params, "batch_stats": batch_stats}
    return (NETWORK.apply(variables, x, train=False).argmax(-1) == y).mean()


def test_the_average_of_a_train_state(trained):
    state, snapshots = trained
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *snapshots)
    for read in (averaged_params, finalize, jax.jit(averaged_params)):
        for opt_state in (state.opt_state, state):  # the whole state holds it, too
            got = read(opt_state, state.params)
            assert jax.tree.structure(got) == jax.tree.structure(state.params)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, mean
            )
    assert n_averaged(state) == len(snapshots)
    evaluating = state.replace(params=finalize(state.opt_state, state.params))
    assert type(evaluating) is State
    with pytest.raises(StateError, match="holds no average"):
        averaged_params(state.params, state.params)


def test_digits_with_the_statistics_of_the_averaged_weights(trained):
    state, _ = trained
    x, _, x_test, y_test = digits()
    params = finalize(state.opt_state, state.params)
    keys = {"dropout": jax.random.key(3)}

    def apply(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        return NETWORK.apply(variables, batch, train=True, mutable=["batch_stats"], rngs=keys)[1][
            "batch_stats"
        ]

    batches = [x[start : start + BATCH] for start in range(0, len(x), BATCH)]
    assert len(batches[-1]) != BATCH
    batch_stats = update_bn(Partial(apply, params), state.batch_stats, iter(batches))
    first = jax.lax.conv_general_dilated(
        x, params["Conv_0"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    seen = np.float64(first).reshape(-1, 16)
    np.testing.assert_allclose(batch_stats["BatchNorm_0"]["mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(batch_stats["BatchNorm_0"]["var"], seen.var(0), rtol=1e-4)

    fresh = initial(x[:1])["batch_stats"]
    averaged = accuracy(params, batch_stats, x_test, y_test)
    last = accuracy(state.params, state.batch_stats, x_test, y_test)
    assert averaged > 0.95
    assert averaged >= last - 0.01
    assert accuracy(params, fresh, x_test, y_test) < averaged  # the statistics are what it needs
