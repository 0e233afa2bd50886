"""swa_optax driven by script: a jitted step of a real chain, ``optax.sgd`` and ``swa``."""

from __future__ import annotations

import contextlib
import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_optax


class OptaxDriver:
    expected_failures = {  # noqa: RUF012
        "update_while_swapped_is_refused": "the weights are values: averaged_params returns a "
        "tree, nothing is swapped, and an update meanwhile disturbs nothing",
    }

    def start(
        self, weights, config, *, steps_per_epoch=None, total_steps=None, frozen=(), tied=None
    ):
        self.tied = dict(tied or {})  # in JAX one leaf, used twice
        self.frozen = frozenset(frozen)
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.tx, self.step = compiled(self.optimizer, config, self.frozen, **lengths)
        self.schedule = config.schedule(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self.rule, self.lent = config.rule, False
        self.params = self.without_aliases(weights)
        self.state = self.tx.init(self.params)

    @staticmethod
    def optimizer(config, frozen, **lengths):
        tx = optax.chain(optax.sgd(1.0), swa_optax.swa(config, **lengths))
        return freezing(tx, frozen) if frozen else tx

    def without_aliases(self, weights):
        return {name: jnp.array(leaf) for name, leaf in weights.items() if name not in self.tied}

    def with_aliases(self, params):
        found = {name: np.array(leaf) for name, leaf in params.items()}
        return found | {alias: found[name].copy() for alias, name in self.tied.items()}

    def train(self, weights):
        params, grads = {}, {}
        for name, new in weights.items():
            if name in self.frozen or new.dtype.kind in "iub":  # set by hand
                params[name], grads[name] = new, np.zeros_like(new)
            elif name not in self.tied:
                params[name], grads[name] = way_to(new, np.asarray(self.params.get(name)))
        self.params, self.state = self.step(params, grads, self.state)

    def weights(self):
        read = swa_optax.averaged_params(self.state, self.params) if self.lent else self.params
        return self.with_aliases(read)

    def average(self):
        live = swa_optax.averaged_params(self.state, self.params)
        if not swa_optax.n_averaged(self.state):
            return self.with_aliases(live)
        average = optax.tree.get(self.state, "average")
        return self.with_aliases({k: v for k, v in average.items() if isinstance(v, jax.Array)})

    def n_averaged(self):
        return swa_optax.n_averaged(self.state)

    def n_skipped(self):
        return swa_optax.n_skipped(self.state)

    @contextlib.contextmanager
    def averaged(self):
        swa_optax.averaged_params(self.state, self.params)  # warns when there is none
        self.lent = True
        try:
            yield
        finally:
            self.lent = False

    def finalize(self):
        self.params = swa_optax.finalize(self.state, self.params)

    def save(self):
        state = swa_optax.state_to_dict(self.state, schedule=self.schedule, rule=self.rule)
        return copy.deepcopy({"model": self.with_aliases(self.params), "swa": state})

    def load(self, saved):
        self.params = self.without_aliases(saved["model"])
        self.state = swa_optax.state_from_dict(
            saved["swa"], self.state, schedule=self.schedule, rule=self.rule
        )


@functools.cache  # the many drivers of one check share a compiled step
def compiled(optimizer, config, frozen, **lengths):
    tx = optimizer(config, frozen, **lengths)

    @jax.jit
    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def freezing(tx, frozen):
    return optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in frozen else "trained" for name in params},
    )


def way_to(new, old):
    """Parameters and gradients by which a step at rate 1 leads exactly to ``new``.

    The difference does the step where adding it gives ``new`` to the bit. Elsewhere the parameter
    is set to -0.0, the one number that leaves whatever is added to it as it is.
    """
    if old.shape != new.shape or old.dtype != new.dtype:
        old = np.zeros_like(new)
    with np.errstate(all="ignore"):
        change = new - old
        bits = f"u{new.dtype.itemsize}"
        exact = np.asarray(old + change, new.dtype).view(bits) == new.view(bits)
    start, change = np.where(exact, old, -np.zeros_like(new)), np.where(exact, change, new)
    # The sign of a NaN is no number that -1 would turn.
    grad = np.where(np.isnan(change), change, -change)
    return start.astype(new.dtype), grad.astype(new.dtype)
