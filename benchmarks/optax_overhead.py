"""What averaging costs in a jitted, donated train step, beside one without it.

    python benchmarks/optax_overhead.py [--rounds 20] [--millions 4]

A step of Adam on a network whose gradient is real work; swa never due, due at every tenth update
and at every update; and an exponential moving average written by hand into the step.
"""

from __future__ import annotations

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, table

from swa_optax import averaged_params, swa

STEPS = 10


def loss(params, x):
    for w in params["layers"]:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def contender(config, params, x, by_hand=False):
    tx = optax.adam(1e-3) if config is None else optax.chain(optax.adam(1e-3), swa(config))

    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        params, opt_state, average = state
        updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state, params)
        params = optax.apply_updates(params, updates)
        if by_hand:
            average = jax.tree.map(lambda a, p: a + 1e-3 * (p - a), average, params)
        return params, opt_state, average

    copy = jax.tree.map(jnp.array, params)
    holder = [(copy, tx.init(copy), jax.tree.map(jnp.array, params) if by_hand else None)]

    def run():
        for _ in range(STEPS):
            holder[0] = step(holder[0], x)
        jax.block_until_ready(holder[0])

    return run, holder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--millions", type=float, default=4)
    options = parser.parse_args()
    width = int(np.sqrt(options.millions * 1e6 / 4))
    rng = np.random.default_rng(0)
    params = {
        "layers": [
            jnp.asarray(rng.normal(0, width**-0.5, (width, width)), jnp.float32) for _ in range(4)
        ]
    }
    x = jnp.asarray(rng.standard_normal((64, width)), jnp.float32)
    configs = {
        "Adam": None,
        "Adam, swa never due": {"start": "1000000000step", "every": "1step"},
        "Adam, swa at every 10th update": {"start": "1step", "every": "10step"},
        "Adam, swa at every update": {"start": "1step", "every": "1step"},
    }
    pairs = {name: contender(config, params, x) for name, config in configs.items()}
    pairs["Adam, EMA by hand at every update"] = contender(None, params, x, by_hand=True)
    times = interleaved({name: run for name, (run, _) in pairs.items()}, options.rounds)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].platform}, {options.rounds} rounds of {STEPS}\n"
    )
    print(table(f"A train step of {4 * width * width / 1e6:.1f} M weights", times, calls=STEPS))
    last = {name: holder[0][:2] for name, (_, holder) in pairs.items()}
    for name, (weights, _) in last.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), weights, last["Adam"][0])
        assert all(jax.tree.leaves(same)), f"{name} changed the training"
    weights, opt_state = last["Adam, swa at every update"]
    averaged = averaged_params(opt_state, weights)
    assert not bool((averaged["layers"][0] == weights["layers"][0]).all()), "nothing was averaged"


if __name__ == "__main__":
    main()
