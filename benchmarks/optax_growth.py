"""Growth in JAX: ours, the fastest peers, and the loop in C."""

from __future__ import annotations

from collections.abc import Mapping

import ceiling
import jax
from growth import Beside
from optax_snapshots import CONTENDERS, Weights

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
NAMES = (
    "C loop",
    "swa_optax.swa, keep",
    "swa_optax.swa, skip",
    "optax.incremental_update, jitted",
    "flax nnx.EMA, jitted",
)
# Of the weights: themselves and what they move to, an average for each, and C's own weights.
COPIES = 2 + len(NAMES) + 1


def beside(count: int, n_weights: int) -> Beside:
    """So many tensors of so many weights in all."""
    weights = Weights(count, n_weights // count, "float32")
    chosen = [who for who in CONTENDERS if who.name in NAMES]
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
