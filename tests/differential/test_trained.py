"""The same network, trained from the same weights on the same batches in every framework.

The trainings themselves differ by float32 rounding; snapshots must be the same updates, and the
averages equal within that noise. The reference is numpy: a gradient by hand and the core's update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch

import swa_core
import swa_keras
import swa_optax
import swa_torch
from swa_core import EMA, LearningRate, Polynomial, SWAConfig

EPOCHS, STEPS, SIZE = 6, 7, 16
LENGTHS = {"steps_per_epoch": STEPS, "total_steps": EPOCHS * STEPS}
RATE = 0.5
NAMES = ("w1", "b1", "w2", "b2")


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * SIZE, 5)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32) + (x[:, 2] > 1)
    weights = {
        "w1": rng.normal(0, 0.4, (5, 8)).astype(np.float32),
        "b1": np.zeros(8, np.float32),
        "w2": rng.normal(0, 0.4, (8, 3)).astype(np.float32),
        "b2": np.zeros(3, np.float32),
    }
    return x, y.astype(np.int32), weights


def batches(x, y):
    for _ in range(EPOCHS):
        for start in range(0, len(y), SIZE):
            yield x[start : start + SIZE], y[start : start + SIZE]


def run_numpy(config, x, y, weights):
    schedule = config.schedule(**LENGTHS)
    lr = config.lr_schedule(**LENGTHS)
    weights = dict(weights)
    state, snapshots = swa_core.init(weights), []
    for update, (bx, by) in enumerate(batches(x, y), start=1):
        hidden = np.tanh(bx @ weights["w1"] + weights["b1"])
        logits = hidden @ weights["w2"] + weights["b2"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(by)), by] -= 1
        d_logits = p / len(by)
        d_hidden = (d_logits @ weights["w2"].T) * (1 - hidden**2)
        grads = {
            "w1": bx.T @ d_hidden,
            "b1": d_hidden.sum(0),
            "w2": hidden.T @ d_logits,
            "b2": d_logits.sum(0),
        }
        rate = RATE if lr is None else float(swa_core.learning_rate(update, RATE, lr))
        weights = {name: weights[name] - np.float32(rate) * grads[name] for name in NAMES}
        before = state.n_averaged
        state = swa_core.update(state, weights, schedule, config.rule)
        if state.n_averaged > before:
            snapshots.append(update)
    return snapshots, [state.average[name] for name in NAMES], [weights[name] for name in NAMES]


def run_torch(config, x, y, weights):
    parameters = [torch.nn.Parameter(torch.from_numpy(weights[name].copy())) for name in NAMES]
    w1, b1, w2, b2 = parameters
    optimizer = swa_torch.SWA(torch.optim.SGD(parameters, lr=RATE), config, **LENGTHS)
    snapshots = []
    for update, (bx, by) in enumerate(batches(x, y), start=1):
        logits = torch.tanh(torch.from_numpy(bx) @ w1 + b1) @ w2 + b2
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(by).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if optimizer.n_averaged > len(snapshots):
            snapshots.append(update)
    average = [leaf.numpy() for leaf in optimizer.averaged_parameters]
    return snapshots, average, [parameter.detach().numpy() for parameter in parameters]


def run_keras(config, x, y, weights):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for variable, name in zip(model.trainable_variables, NAMES, strict=True):
        variable.assign(weights[name])
    swa, snapshots = swa_keras.SWA(config, finalize=False), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if swa.n_averaged > len(snapshots):
                snapshots.append(swa.updates)

    model.fit(
        x, y, batch_size=SIZE, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[swa, Watch()]
    )
    last = [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.trainable_variables]
    with swa.averaged():
        average = [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.trainable_variables]
    return snapshots, average, last


def run_optax(config, x, y, weights):
    tx = optax.chain(
        optax.sgd(swa_optax.swa_lr(RATE, config, **LENGTHS)), swa_optax.swa(config, **LENGTHS)
    )

    def loss(params, bx, by):
        logits = jnp.tanh(bx @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, by).mean()

    @jax.jit
    def step(params, opt_state, bx, by):
        updates, opt_state = tx.update(jax.grad(loss)(params, bx, by), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {name: jnp.array(leaf) for name, leaf in weights.items()}
    opt_state, snapshots = tx.init(params), []
    for update, (bx, by) in enumerate(batches(x, y), start=1):
        params, opt_state = step(params, opt_state, bx, by)
        if swa_optax.n_averaged(opt_state) > len(snapshots):
            snapshots.append(update)
    average = swa_optax.averaged_params(opt_state, params)
    return (
        snapshots,
        [np.asarray(average[n]) for n in NAMES],
        [np.asarray(params[n]) for n in NAMES],
    )


CONFIGS = {
    "uniform": SWAConfig(start="50%", every="1ep"),
    "ema, every update": SWAConfig(start="2ep", every="1step", rule=EMA(0.8), stop="5ep"),
    "polynomial, annealed rate": SWAConfig(
        start="3ep",
        every="3step",
        rule=Polynomial(eta=3),
        lr=LearningRate(value=0.2, anneal="1ep", shape="cosine"),
    ),
    "cyclical rate": SWAConfig(
        start="2ep", every="1ep", lr=LearningRate(value=0.4, cycle="1ep", low=0.05)
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_frameworks_agree(problem, config):
    snapshots, average, last = run_numpy(config, *problem)
    assert snapshots == list(config.schedule(**LENGTHS).snapshots(LENGTHS["total_steps"]))
    distance = max(np.abs(a - b).max() for a, b in zip(average, last, strict=True))
    assert distance > 1e-2, (
        "the average must differ from the last weights for this to show anything"
    )
    for run in (run_torch, run_keras, run_optax):
        taken, theirs, their_last = run(config, *problem)
        assert taken == snapshots, run.__name__
        for name, a, b, ours, wanted in zip(NAMES, theirs, their_last, average, last, strict=True):
            np.testing.assert_allclose(b, wanted, rtol=0, atol=2e-5, err_msg=f"{run} {name} last")
            np.testing.assert_allclose(a, ours, rtol=0, atol=2e-5, err_msg=f"{run} {name} average")
