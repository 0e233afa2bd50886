"""The experiments in JAX, with flax and optax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments import jax_networks
from experiments.arms import Arm
from experiments.images import Batch, Images
from swa_core import SWAConfig, SWAState
from swa_optax import averaged_params, swa, swa_lr, update_bn

Tree = Any
State = tuple[Tree, Tree, Tree]  # parameters, batch-norm statistics, the optimizer's


class Training:
    """See ``experiments.training.Training``."""

    def __init__(self, images: Images, seed: int):
        self._images, self._seed = images, seed
        experiment = images.experiment
        self._network, params, stats = jax_networks.build(
            experiment.network, images.channels, images.classes, seed
        )
        self._configs: dict[str, SWAConfig] = {}
        self._snapshots: dict[str, list[int]] = {}
        self._tx = self._optimizer(experiment.rate)
        self._state: State = params, stats, self._tx.init(params)

    def begin(self, arm: Arm) -> None:
        self._arm = arm
        self._configs = dict(arm.averages)
        self._snapshots = {name: [] for name in self._configs}
        self._tx = self._optimizer(arm.rate(arm.begin))
        params, stats, opt_state = self._state
        momentum = optax.tree.get(opt_state, "trace")
        self._state = params, stats, optax.tree.set(self._tx.init(params), trace=momentum)

    def epoch(self, batches: Iterable[Batch], epoch: int) -> None:
        if not self._cyclical:  # else the rate is [swa.lr]'s
            params, stats, opt_state = self._state
            rate = jnp.array(self._arm.rate(epoch), jnp.float32)
            self._state = params, stats, optax.tree.set(opt_state, learning_rate=rate)
        params, stats, opt_state = self._state
        counts = []
        for x, y in batches:
            grads, stats = _gradients(self._network, params, stats, x, y)
            params, opt_state, count = _update(self._tx, params, opt_state, grads)
            counts.append(count)  # to be read afterwards: the next step does not wait
        self._state = params, stats, opt_state
        for update, *averaged in np.array(counts).tolist():
            for taken, number in zip(self._snapshots.values(), averaged, strict=True):
                if number > len(taken):
                    taken.append(update)

    def snapshots(self, average: str) -> list[int]:
        return self._snapshots[average]

    def logits(self, average: str | None, *, bn: bool, images: int | None = None) -> np.ndarray:
        params, stats, _ = self._state
        if average:
            params = averaged_params(self._average_state(average), params)
        if bn:
            forward = Partial(_forward(self._network), params)
            stats = update_bn(forward, stats, self._images.for_bn(self._seed))
        x = self._images.test_x[:images]
        parts = [
            _predict(self._network, params, stats, x[i : i + 500]) for i in range(0, len(x), 500)
        ]
        return np.concatenate(parts)

    def average(self, average: str) -> list[np.ndarray]:
        params = averaged_params(self._average_state(average), self._state[0])
        return jax_networks.leaves(params)

    def state(self, *, averages: bool) -> dict[str, Any]:
        params, stats, opt_state = self._state
        state = {"params": params, "stats": stats, "momentum": optax.tree.get(opt_state, "trace")}
        if averages:
            state["opt_state"] = opt_state
        state = jax.tree.map(np.array, state)  # copies: the update is given the memory of these
        return state | ({"snapshots": self._snapshots} if averages else {})

    def restore(self, state: dict[str, Any]) -> None:
        self._snapshots |= state.get("snapshots", {})
        opt_state = state.get("opt_state", self._state[2])
        opt_state = optax.tree.set(opt_state, trace=state["momentum"])
        self._state = jax.tree.map(jnp.array, (state["params"], state["stats"], opt_state))

    def _average_state(self, name: str) -> SWAState:
        # Several averages in one chain: each is read by its own part of the state.
        return self._state[2][_AVERAGES:][list(self._configs).index(name)]

    @property
    def _cyclical(self) -> bool:
        return any(config.lr for config in self._configs.values())

    def _optimizer(self, rate: float) -> optax.GradientTransformation:
        experiment = self._images.experiment
        configs = tuple(self._configs.values())
        base = rate if self._cyclical else None
        steps = experiment.steps_per_epoch
        return _optimizer(experiment.momentum, experiment.weight_decay, configs, steps, base)


# Where the averages begin in the state of the chain.
_AVERAGES = 2


# Cached, and so the update below is compiled once for each set of averages.
@cache
def _optimizer(
    momentum: float,
    weight_decay: float,
    configs: tuple[SWAConfig, ...],
    steps_per_epoch: int,
    base: float | None,
) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = 0.0  # set before each epoch
    for config in configs:
        if config.lr is not None:
            rate = swa_lr(base, config, steps_per_epoch=steps_per_epoch)
    sgd = optax.inject_hyperparams(optax.sgd, static_args="momentum")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        sgd(learning_rate=rate, momentum=momentum),
        *(swa(config, steps_per_epoch=steps_per_epoch) for config in configs),
    )


# Apart from the update, for it is what takes long to compile, and is the same in every arm.
@partial(jax.jit, static_argnums=0)
def _gradients(
    network: jax_networks.Network, params: Tree, stats: Tree, x: jax.Array, y: jax.Array
) -> tuple[Tree, Tree]:
    """Gradients, and the batch-norm statistics after this batch."""

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        variables = {"params": params, "batch_stats": stats}
        logits, new = network.apply(variables, x, training=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new["batch_stats"]

    return jax.grad(loss, has_aux=True)(params)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(
    tx: optax.GradientTransformation, params: Tree, opt_state: Tree, grads: Tree
) -> tuple[Tree, Tree, jax.Array]:
    """What an update makes; and how many updates and snapshots of each average there were."""
    updates, opt_state = tx.update(grads, opt_state, params)
    averages = opt_state[_AVERAGES:]
    counts = [average.n_averaged for average in averages]
    updated = [averages[0].n_updates if averages else jnp.array(0)]
    return optax.apply_updates(params, updates), opt_state, jnp.stack(updated + counts)


@partial(jax.jit, static_argnums=0)
def _predict(network: jax_networks.Network, params: Tree, stats: Tree, x: jax.Array) -> jax.Array:
    return network.apply({"params": params, "batch_stats": stats}, x, training=False)


@cache
def _forward(network: jax_networks.Network) -> Callable[[Tree, Tree, jax.Array], Tree]:
    """The statistics after a forward in training mode, by one function: it is compiled once."""

    def forward(params: Tree, stats: Tree, x: jax.Array) -> Tree:
        variables = {"params": params, "batch_stats": stats}
        return network.apply(variables, x, training=True, mutable=["batch_stats"])[1]["batch_stats"]

    return forward
