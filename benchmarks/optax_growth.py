"""Growth in JAX: ours, the fastest peers, and the loop in C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ceiling
import jax
from growth import Beside
from optax_snapshots import CONTENDERS, Weights

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
OURS = "swa_optax.swa, skip"
# Of the weights, measured; see ``growth.affordable``.
COPIES = {
    "": 2.7,
    OURS: 1,
    "swa_optax.swa, keep": 1,
    ceiling.NAME: 2,
    "optax.incremental_update, jitted": 1,
    "flax nnx.EMA, jitted": 4,
}


def beside(count: int, n_weights: int, names: Sequence[str]) -> Beside:
    """So many tensors of so many weights in all, averaged by these."""
    weights = Weights(count, n_weights // count, "float32")
    chosen = [who for who in CONTENDERS if who.name in names]
    absent = {who.name: why for who in chosen if (why := who.missing("float32")) is not None}
    if (why := ceiling.missing()) is not None:
        absent[ceiling.NAME] = why
    if jax.default_backend() != "cpu":
        absent[ceiling.NAME] = "the loop runs on the CPU, the rest does not"
    here = [who for who in chosen if who.name not in absent]
    running = {who.name: who.build(weights) for who in here}

    def errors() -> Mapping[str, float]:
        return {
            who.name: weights.error(running[who.name].averages(), who.mix)
            for who in here
            if who.name != ceiling.NAME  # whose weights do not move
        }

    updates = {name: each.update for name, each in running.items()}
    return Beside(updates, weights.move, errors, absent)
