"""An optimizer and its average as one transformation, which counts the updates that are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import ConfigError, StateError, StructureError
from swa_optax import averaged_params, finalize, n_averaged, swa, wrap

EVERY = {"start": "1step", "every": "1step"}
pytestmark = pytest.mark.usefixtures("relaxed_jax")


def params_like():
    return {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}


def gradients(n, bad=()):
    """Gradients, of which those at the places ``bad`` hold a NaN."""
    rng = np.random.default_rng(0)
    for place in range(n):
        found = {
            name: rng.standard_normal(leaf.shape, np.float32)
            for name, leaf in params_like().items()
        }
        if place in bad:
            found["bias"][1] = np.nan
        yield found


def train(tx, grads):
    """Parameters, state, and the parameters after every call."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, visited = params_like(), []
    state = tx.init(params)
    for gradient in grads:
        params, state = step(params, state, gradient)
        visited.append(params)
    assert step._cache_size() == 1
    return params, state, visited


def distinct(visited):
    """The parameters after the updates that were made: after those calls that changed them."""
    before, found = params_like(), []
    for params in visited:
        if not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, params)):
            found.append(params)
        before = params
    return found


def assert_mean(state, params, made):
    assert n_averaged(state) == int(state[-1].n_updates) == len(made)
    expected = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *made)
    got = finalize(state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), got, expected)


def test_it_is_the_chain():
    grads = list(gradients(6))
    ours = train(wrap(optax.adam(0.1), EVERY), grads)
    chained = train(optax.chain(optax.adam(0.1), swa(EVERY)), grads)
    assert jax.tree.structure(ours) == jax.tree.structure(chained)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, chained))


WITHIN = {
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 3),
    "its transformation": lambda: optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "in a chain": lambda: optax.chain(
        optax.clip(9.0), optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    ),
    "in a named chain": lambda: optax.named_chain(
        ("few", optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()),
        ("clip", optax.clip(9.0)),
    ),
    "with hyperparameters": lambda: optax.inject_hyperparams(
        lambda rate: optax.MultiSteps(optax.sgd(rate), 3).gradient_transformation()
    )(0.1),
    "a schedule of them": lambda: optax.MultiSteps(
        optax.sgd(0.1), lambda step: jnp.where(step < 2, 1, 3)
    ),
}


@pytest.mark.parametrize("name", WITHIN)
def test_only_whole_steps_of_accumulated_gradients_count(name):
    params, state, visited = train(wrap(WITHIN[name](), EVERY), gradients(8))
    assert len(distinct(visited)) == (4 if name == "a schedule of them" else 2)
    assert_mean(state, params, distinct(visited))


def test_the_schedule_counts_whole_steps():
    tx = wrap(optax.MultiSteps(optax.sgd(0.1), 2), {"start": "2step", "every": "2step"})
    params, state, visited = train(tx, gradients(9))
    assert int(state[-1].n_updates) == 4
    expected = np.mean([visited[3]["bias"], visited[7]["bias"]], axis=0)
    np.testing.assert_allclose(averaged_params(state, params)["bias"], expected, rtol=1e-6)


def test_refused_updates_do_not_count():
    tx = wrap(optax.apply_if_finite(optax.adam(0.1), 5), EVERY)
    params, state, visited = train(tx, gradients(7, bad=(0, 3, 4)))
    made = [visited[place] for place in (1, 2, 5, 6)]
    assert_mean(state, params, made)


def test_an_update_of_nothing_counts_as_one():
    # Not what the parameters do decides, but what apply_if_finite says.
    tx = wrap(optax.apply_if_finite(optax.sgd(0.0), 5), EVERY)
    _, state, _ = train(tx, gradients(4, bad=(1,)))
    assert int(state[-1].n_updates) == 3


def test_a_bad_update_that_passes_after_too_many_counts_and_is_no_snapshot():
    tx = wrap(optax.apply_if_finite(optax.sgd(0.1), 1), EVERY)
    _, state, visited = train(tx, gradients(4, bad=(1, 2)))
    assert np.isnan(visited[2]["bias"]).any()
    last = state[-1]
    assert (int(last.n_updates), int(last.n_averaged), int(last.n_skipped)) == (3, 1, 2)


@pytest.mark.parametrize("outer", ["MultiSteps", "apply_if_finite"])
def test_one_inside_of_the_other(outer):
    if outer == "MultiSteps":  # the bad sum is refused, and MultiSteps never gets rid of it
        inner = optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 5), 2)
        bad, made = (3,), (1,)
    else:  # a bad batch is left out of the sum
        inner = optax.apply_if_finite(
            optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), 5
        )
        bad, made = (3,), (1, 4)
    params, state, visited = train(wrap(inner, EVERY), gradients(6, bad))
    assert_mean(state, params, [visited[place] for place in made])


def test_batches_that_the_accumulation_itself_leaves_out():
    steps = optax.MultiSteps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    params, state, visited = train(wrap(steps, EVERY), gradients(7, bad=(0, 3)))
    assert_mean(state, params, [visited[2], visited[5]])


def test_a_part_that_waits_does_not_stop_the_count():
    steps = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    labels = {"kernel": "few", "bias": "all"}
    tx = wrap(optax.partition({"few": steps, "all": optax.sgd(0.1)}, labels), EVERY)
    params, state, visited = train(tx, gradients(4))
    assert_mean(state, params, visited)


def test_what_comes_behind_is_refused_where_the_average_is_read():
    tx = optax.chain(wrap(optax.scale_by_adam(), EVERY), optax.scale(-0.1))
    params, state, _ = train(tx, gradients(2))
    with pytest.raises(StateError, match="swa is not last in its chain"):
        averaged_params(state, params)


def test_members_of_an_ensemble_count_for_themselves():
    tx = wrap(optax.apply_if_finite(optax.sgd(0.1), 5), EVERY)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params_like())
    state = jax.vmap(tx.init)(params)
    for gradient in gradients(3):
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), gradient)
        both["bias"] = both["bias"].at[1, 0].set(jnp.nan)
        updates, state = jax.jit(jax.vmap(tx.update))(both, state, params)
        params = optax.apply_updates(params, updates)
    assert state[-1].n_updates.tolist() == [3, 0]


def test_extra_arguments_reach_the_optimizer():
    tx = wrap(optax.lbfgs(), EVERY)
    target = jnp.array([1.0, -2.0])

    def loss(params):
        return jnp.sum((params - target) ** 2)

    params = jnp.zeros(2)
    state = tx.init(params)
    value, grad = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    assert loss(optax.apply_updates(params, updates)) < value
    assert n_averaged(state) == 1


def test_bad_input():
    with pytest.raises(TypeError, match="inner must be an optax optimizer, got dict"):
        wrap(EVERY, optax.sgd(0.1))
    with pytest.raises(ConfigError, match=r"swa\.evry"):
        wrap(optax.sgd(0.1), {"evry": "1step"})
    with pytest.raises(ValueError, match='memory_kind must be "pinned_host" or None'):
        wrap(optax.sgd(0.1), EVERY, memory_kind="device")
    tx = wrap(optax.sgd(0.1), EVERY)
    with pytest.raises(StructureError, match="swa was updated without the parameters"):
        tx.update(params_like(), tx.init(params_like()))
