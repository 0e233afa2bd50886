"""L-BFGS and line searches: their arguments pass through, and their names are not ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import quick_jit, same_bits

from swa_core import SWAConfig, SWAState
from swa_optax import averaged_params, n_averaged, swa, wrap

EVERY = SWAConfig(start="1step", every="1step", nonfinite="keep")
pytestmark = pytest.mark.usefixtures("relaxed_jax")

SEARCHES = {
    "zoom": lambda: optax.lbfgs(memory_size=2),
    "backtracking": lambda: optax.lbfgs(
        memory_size=2,
        linesearch=optax.scale_by_backtracking_linesearch(5, store_grad=True),
    ),
    "of gradient descent": lambda: optax.chain(
        optax.sgd(0.5), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
}


def value(w):
    return jnp.sum(jnp.square(w - jnp.array([1.0, 2.0, 3.0])) * jnp.array([1.0, 4.0, 9.0]))


def run(tx, n=3):
    value_and_grad = optax.value_and_grad_from_state(value)

    @quick_jit
    def epoch(w, state):
        def step(carry, _):
            w, state = carry
            loss, grad = value_and_grad(w, state=state)
            updates, state = tx.update(grad, state, w, value=loss, grad=grad, value_fn=value)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, state), None, length=n)

    w = jnp.zeros(3)
    (w, state), visited = epoch(w, tx.init(w))
    return w, state, visited


@pytest.mark.parametrize("search", SEARCHES)
def test_behind(search):
    optimizer = SEARCHES[search]()
    w, state, visited = run(optax.chain(optimizer, swa(EVERY)))
    same_bits(visited, run(optimizer)[2])
    assert n_averaged(state) == 3
    np.testing.assert_allclose(averaged_params(state, w), np.mean(visited, axis=0), rtol=1e-6)
    for field in SWAState._fields:
        assert optax.tree.get(state, field) is getattr(state[-1], field)


def test_wrapped():
    # wrap asks nothing of the line search, and gives it its arguments.
    w, state, visited = run(wrap(SEARCHES["backtracking"](), EVERY))
    np.testing.assert_allclose(averaged_params(state, w), np.mean(visited, axis=0), rtol=1e-6)
