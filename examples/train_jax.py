"""The demo's network in JAX, with flax and optax. What averaging adds is marked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import Data
from flax import linen as nn
from jax.tree_util import Partial
from record import LINE, Record, score

from swa_core import SWAConfig
from swa_optax import averaged_params, n_averaged, swa, swa_lr, update_bn


class Network(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, training: bool):
        for features, stride in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def loss_and_stats(network, params, batch_stats, x, y):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = network.apply(variables, x, training=True, mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, new["batch_stats"]


@partial(jax.jit, static_argnames=("network", "tx"), donate_argnames="state")
def step(network, tx, state, x, y):
    params, batch_stats, opt_state = state
    gradient = jax.grad(partial(loss_and_stats, network), has_aux=True)
    grads, batch_stats = gradient(params, batch_stats, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state


@partial(jax.jit, static_argnames="network")
def predict(network, params, batch_stats, x):
    return network.apply({"params": params, "batch_stats": batch_stats}, x, training=False)


def forward(network, params, batch_stats, x):
    """The batch statistics after one forward pass in training mode, for update_bn."""
    variables = {"params": params, "batch_stats": batch_stats}
    return network.apply(variables, x, training=True, mutable=["batch_stats"])[1]["batch_stats"]


def begin(data: Data, seed: int):
    network = Network(data.classes)
    variables = network.init(jax.random.key(seed), jnp.asarray(data.train_x[:1]), training=False)
    return network, variables["params"], variables["batch_stats"]


def train(
    data: Data,
    config: SWAConfig,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    curves: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Trains with averaging."""
    rng = np.random.default_rng(seed)
    network, params, batch_stats = begin(data, seed)
    steps_per_epoch = data.steps_per_epoch(batch_size)
    lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": epochs * steps_per_epoch}
    for_bn = [data.for_bn[at : at + 1000] for at in range(0, len(data.for_bn), 1000)]
    apply = partial(forward, network)
    record = Record()

    tx = optax.chain(
        optax.sgd(swa_lr(rate, config, **lengths), momentum=0.9),
        swa(config, **lengths),  # averaging: the last of the chain; the loop does not change
    )
    state = params, batch_stats, tx.init(params)

    def nll(params, batch_stats) -> float:
        return score(predict(network, params, batch_stats, data.test_x), data.test_y).nll

    update = 0
    for _ in range(epochs):
        for x, y in data.batches(batch_size, rng):
            state = step(network, tx, state, x, y)
            update += 1
            if n_averaged(state[2]) > len(record.snapshots):
                record.snapshots.append(update)
        params, batch_stats, opt_state = state
        if curves:
            record.last.append(nll(params, batch_stats))
            if n_averaged(opt_state):
                averaged = averaged_params(opt_state, params)  # averaging: evaluate on it
                stats = update_bn(Partial(apply, averaged), batch_stats, for_bn)
                record.average.append(nll(averaged, stats))
            else:
                record.average.append(None)
        progress()

    params, batch_stats, opt_state = state
    averaged = averaged_params(opt_state, params)  # averaging: keep it
    averaged_stats = update_bn(Partial(apply, averaged), batch_stats, for_bn)
    for name, variables in (
        ("last", (params, batch_stats)),
        ("average", (averaged, batch_stats)),
        ("average + update_bn", (averaged, averaged_stats)),
    ):
        record.scores[name] = score(predict(network, *variables, data.test_x), data.test_y)
    if curves:
        for t in LINE:
            point = optax.incremental_update(averaged, params, t)
            stats = update_bn(Partial(apply, point), batch_stats, for_bn)
            record.line.append(nll(point, stats))
    return record


def train_annealed(
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """The baseline without averaging: the rate annealed to zero along a cosine."""
    rng = np.random.default_rng(seed)
    network, params, batch_stats = begin(data, seed)
    schedule = optax.cosine_decay_schedule(rate, epochs * data.steps_per_epoch(batch_size))
    tx = optax.sgd(schedule, momentum=0.9)
    state = params, batch_stats, tx.init(params)
    for _ in range(epochs):
        for x, y in data.batches(batch_size, rng):
            state = step(network, tx, state, x, y)
        progress()
    params, batch_stats, _ = state
    return Record(
        scores={"annealed": score(predict(network, params, batch_stats, data.test_x), data.test_y)}
    )
