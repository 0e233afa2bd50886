"""The transformation inside of optax' own combinators, by their real behaviour."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from swa_core import StateError, SWAConfig, SWAState
from swa_optax import averaged_params, finalize, n_averaged, n_skipped, state_to_dict, swa

EVERY = SWAConfig(start="1step", every="1step")
pytestmark = pytest.mark.usefixtures("relaxed_jax")


def params_like():
    return {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "scale": jnp.array(2.0)}


def gradients(n, params, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), "f4"), params)


def train(tx, grads, params, **extra):
    """Trains, and returns the parameters, the state and all the parameters that came about."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, visited = tx.init(params), []
    for gradient in grads:
        params, state = step(params, state, gradient)
        visited.append(params)
    return params, state, visited


def assert_average(state, params, visited):
    expected = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *visited)
    got = averaged_params(state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), got, expected)


def test_last_in_a_chain():
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1), swa(EVERY))
    params, state, visited = train(tx, gradients(8, params_like()), params_like())
    assert_average(state, params, visited)


def test_elsewhere_in_a_chain_the_average_is_refused_when_read():
    # It would be one of weights that never were. The transformation cannot see what follows it,
    # but the state of the chain tells; the training is not changed.
    inner = optax.chain(optax.sgd(0.1), swa(EVERY))
    for wrong, place in (
        (optax.chain(swa(EVERY), optax.sgd(0.1)), "opt_state[0]"),
        (optax.chain(optax.scale_by_adam(), swa(EVERY), optax.scale(-0.1)), "opt_state[1]"),
        (optax.chain(inner, optax.keep_params_nonnegative()), "opt_state[0]"),
        (
            optax.MultiSteps(optax.chain(swa(EVERY), optax.sgd(0.1)), 2),
            "opt_state.inner_opt_state[0]",
        ),
    ):
        params, state, _ = train(wrong, gradients(4, params_like()), params_like())
        for read in (
            averaged_params,
            finalize,
            jax.jit(averaged_params),
            lambda state, params: n_averaged(state),
            lambda state, params: state_to_dict(state),
        ):
            with pytest.raises(StateError, match="swa is not last in its chain") as error:
                read(state, params)
            assert place in str(error.value)
            assert "Hint: make it optax.chain(..., swa(config))" in str(error.value)


def test_nested_at_the_ends_of_chains_it_is_last():
    inner = optax.chain(optax.clip(1.0), optax.chain(optax.scale(-0.1), swa(EVERY)))
    tx = optax.chain(optax.identity(), optax.masked(inner, True))
    params, state, visited = train(tx, gradients(4, params_like()), params_like())
    assert_average(state, params, visited)


def test_multi_steps_counts_updates():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), swa(EVERY)), 4)
    params, state, visited = train(tx, gradients(12, params_like()), params_like())
    assert n_averaged(state) == 3
    assert int(optax.tree.get(state, "n_updates")) == 3
    assert_average(state, params, visited[3::4])


def test_outside_of_multi_steps_it_counts_micro_steps():
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), swa(EVERY))
    _, state, _ = train(tx, gradients(12, params_like()), params_like())
    assert n_averaged(state) == 12


def bad_at(places, grads):
    for place, gradient in enumerate(grads):
        bad = place in places
        yield jax.tree.map(lambda leaf, bad=bad: leaf * np.nan if bad else leaf, gradient)


def test_apply_if_finite_counts_what_was_applied():
    tx = optax.apply_if_finite(optax.chain(optax.adam(0.1), swa(EVERY)), 5)
    grads = bad_at({2, 3, 6}, gradients(8, params_like()))
    params, state, visited = train(tx, grads, params_like())
    assert (n_averaged(state), n_skipped(state)) == (5, 0)
    assert_average(state, params, [visited[place] for place in (0, 1, 4, 5, 7)])


def test_masked_leaves_are_read_from_the_live_parameters():
    mask = {"dense": {"kernel": True, "bias": False}, "scale": True}
    tx = optax.chain(optax.sgd(0.1), optax.masked(swa(EVERY), mask))
    params, state, visited = train(tx, gradients(6, params_like()), params_like())
    merged = averaged_params(state, params)
    assert merged["dense"]["bias"] is params["dense"]["bias"]
    merged["dense"]["bias"] = np.mean([v["dense"]["bias"] for v in visited], axis=0)
    expected = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *visited)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), merged, expected
    )


def test_a_mask_for_a_whole_branch():
    tx = optax.chain(optax.sgd(0.1), optax.masked(swa(EVERY), {"dense": False, "scale": True}))
    params, state, visited = train(tx, gradients(6, params_like()), params_like())
    merged = averaged_params(state, params)
    assert merged["dense"] == params["dense"]
    np.testing.assert_allclose(merged["scale"], np.mean([v["scale"] for v in visited]), rtol=2e-6)


def test_partition_with_frozen_parameters():
    labels = {"dense": {"kernel": "trained", "bias": "frozen"}, "scale": "trained"}
    tx = optax.partition(
        {"trained": optax.chain(optax.adam(0.1), swa(EVERY)), "frozen": optax.set_to_zero()}, labels
    )
    params, state, visited = train(tx, gradients(6, params_like()), params_like())
    assert_average(state, params, visited)
    assert averaged_params(state, params)["dense"]["bias"] is params["dense"]["bias"]


def test_after_a_partition():
    labels = {"dense": {"kernel": "a", "bias": "b"}, "scale": "a"}
    tx = optax.chain(
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels), swa(EVERY)
    )
    params, state, visited = train(tx, gradients(6, params_like()), params_like())
    assert_average(state, params, visited)


@pytest.mark.parametrize("where", ["beside", "around"])
def test_inject_hyperparams(where):
    if where == "beside":
        tx = optax.chain(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), swa(EVERY))
    else:

        @optax.inject_hyperparams
        def make(learning_rate):
            return optax.chain(optax.adam(learning_rate), swa(EVERY))

        tx = make(learning_rate=optax.linear_schedule(0.1, 0.0, 8))
    params, state, visited = train(tx, gradients(6, params_like()), params_like())
    assert_average(state, params, visited)


def test_inject_hyperparams_with_lengths_named_static():
    tx = optax.chain(
        optax.sgd(0.1),
        optax.inject_hyperparams(swa, static_args=("steps_per_epoch", "total_steps"))(
            SWAConfig(start="1ep", every="1ep"), steps_per_epoch=3
        ),
    )
    params, state, visited = train(tx, gradients(7, params_like()), params_like())
    assert_average(state, params, visited[2::3])


def test_lookahead_and_extra_arguments():
    tx = optax.chain(
        optax.adam(0.1),
        optax.contrib.reduce_on_plateau(patience=2, accumulation_size=1),
        swa(EVERY),
    )
    params, state, visited = train(
        tx, gradients(6, params_like()), params_like(), value=jnp.array(1.0), anything=3
    )
    assert_average(state, params, visited)


def test_inside_of_schedule_free_the_average_is_found():
    tx = optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), swa(EVERY)), learning_rate=0.1)
    params, state, _ = train(tx, gradients(4, params_like()), params_like())
    assert n_averaged(state) == 4
    assert jax.tree.structure(averaged_params(state, params)) == jax.tree.structure(params)


def test_tree_map_params_finds_the_average():
    tx = optax.chain(optax.adam(0.1), swa(EVERY))
    params = params_like()
    state = tx.init(params)
    doubled = optax.tree_map_params(tx, lambda leaf: 2 * leaf + 1, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, 2 * b + 1), doubled[1].average, params
    )
    assert int(doubled[1].updates) == 0
    specs = jax.tree.map(lambda leaf: f"spec of rank {leaf.ndim}", params)
    mapped = optax.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert mapped[1] == SWAState(None, None, None, None, specs)


def test_tree_map_params_beside_leaves_that_are_not_averaged():
    tx = swa(EVERY)
    params = {"w": jnp.ones(2), "steps": jnp.array(3)}
    mapped = optax.tree_map_params(
        tx,
        lambda average, spec: None if average is None else spec,
        tx.init(params),
        {"w": "spec", "steps": "other"},
        is_leaf=lambda leaf: leaf is None,
    )
    assert mapped.average == {"w": "spec", "steps": None}


def test_tree_map_params_through_a_mask():
    mask = {"dense": {"kernel": True, "bias": False}, "scale": True}
    tx = optax.chain(optax.adam(0.1), optax.masked(swa(EVERY), mask))
    state = tx.init(params_like())
    mapped = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    np.testing.assert_array_equal(optax.tree.get(mapped, "average")["dense"]["kernel"], 2)


def test_tree_get_is_never_ambiguous():
    tx = optax.MultiSteps(
        optax.chain(
            optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
            optax.apply_if_finite(optax.ema(0.9), 3),
            optax.scale_by_schedule(optax.constant_schedule(1.0)),
            swa(EVERY),
        ),
        2,
    )
    state = tx.init(params_like())
    for field in SWAState._fields:
        value = optax.tree.get(state, field)
        ours = getattr(optax.tree.get(state, "SWAState"), field)
        assert jax.tree.structure(value) == jax.tree.structure(ours)
    with pytest.raises(KeyError):
        optax.tree.get(state, "count")  # the trouble that own names avoid
    assert int(optax.tree.get(optax.tree.set(state, n_averaged=jnp.int32(5)), "n_averaged")) == 5


def test_no_state_of_optax_has_a_field_of_ours():
    taken = {
        (field, kind.__name__)
        for module in (optax, optax.contrib)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        for field in getattr(kind, "_fields", ())
    }
    assert len(taken) > 60
    assert not {(field, kind) for field, kind in taken if field in SWAState._fields}
    # L-BFGS has one that reads the same in words.
    state = optax.chain(optax.scale_by_lbfgs(), swa(EVERY)).init(params_like())
    assert int(optax.tree.get(state, "n_updates")) == 0
    assert optax.tree.get(state, "updates").keys() == params_like().keys()
