"""What is particular to the wrappers of optax.contrib: which weights are averaged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from adapter_optax.training import (
    EVERY,
    assert_average,
    assert_close,
    gradients,
    mean,
    params_like,
    same_bits,
    train,
    trained,
)
from optax import contrib

from swa_core import StructureError, SWAConfig
from swa_optax import averaged_params, finalize, n_averaged, swa, wrap

pytestmark = pytest.mark.usefixtures("relaxed_jax")

ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(0.05))
INNER = optax.chain(optax.sgd(0.1), swa(EVERY))


def test_behind_schedule_free_its_own_average_is_read_beside_ours():
    # schedule_free trains y and evaluates x, an average of its own; ours is one of y.
    tx = optax.chain(contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1), swa(EVERY))
    params, state, visited = trained(tx)
    assert_average(state, params, visited)
    alone, own, _ = trained(contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1))
    x = contrib.schedule_free_eval_params(state[0], params)
    same_bits(x, contrib.schedule_free_eval_params(own, alone))
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), x, params))


def test_in_the_outer_optimizer_of_sam_true_steps_count():
    # The steps between are the adversary's, away from the weights that are trained.
    tx = contrib.sam(INNER, ADVERSARY, sync_period=2)
    params, state, visited = trained(tx, 6)
    assert n_averaged(state) == 3
    assert_average(state, params, visited[1::2])


def test_behind_sam_the_steps_of_the_adversary_would_count_too():
    # A schedule that falls on true steps averages those alone.
    sam = contrib.sam(optax.sgd(0.1), ADVERSARY, sync_period=2)
    tx = optax.chain(sam, swa(SWAConfig(start="2step", every="2step")))
    params, state, visited = trained(tx, 6)
    assert_average(state, params, visited[1::2])
    params, state, visited = trained(optax.chain(sam, swa(EVERY)), 6)
    assert_average(state, params, visited)


def test_wrapped_sam_counts_true_steps():
    for tx in (
        contrib.sam(optax.sgd(0.1), ADVERSARY, sync_period=3),
        optax.chain(optax.clip(1.0), contrib.sam(optax.adam(0.1), ADVERSARY, sync_period=3)),
    ):
        params, state, visited = trained(wrap(tx, EVERY), 7)
        assert n_averaged(state) == 2
        assert_average(state, params, [visited[2], visited[5]])


@pytest.mark.parametrize("where", ["inside", "behind", "wrapped"])
def test_opaque_sam_makes_a_true_step_in_every_call(where):
    def sam(inner):
        return contrib.sam(inner, ADVERSARY, opaque_mode=True)

    tx = {
        "inside": sam(INNER),
        "behind": optax.chain(sam(optax.sgd(0.1)), swa(EVERY)),
        "wrapped": wrap(sam(optax.sgd(0.1)), EVERY),
    }[where]
    grad_fn = jax.grad(lambda p, step: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)))
    params, state, visited = trained(tx, grad_fn=grad_fn)
    assert n_averaged(state) == 4
    assert_average(state, params, visited)


def test_reduce_on_plateau_reduces_and_the_average_follows():
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    tx = optax.chain(optax.sgd(0.1), plateau, swa(EVERY))
    params, state, visited = trained(tx, 6, value=jnp.float32(1))
    assert float(optax.tree.get(state, "scale")) < 1
    assert_average(state, params, visited)


def test_muon_and_what_is_not_for_muon():
    # A partition of its own: matrices by muon, the rest by adam.
    params, state, visited = trained(optax.chain(contrib.muon(0.1), swa(EVERY)))
    assert_average(state, params, visited)


def test_private_gradients_are_those_of_examples():
    tx = optax.chain(
        contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(0.1), swa(EVERY)
    )
    start = params_like()
    grads = gradients(3, jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), start))
    params, state, visited = train(tx, grads, start)
    assert_average(state, params, visited)


def test_inside_of_galore_it_fails_loudly():
    # Its inner optimizer runs in another space, and gets no parameters.
    tx = contrib.galore(0.1, rank=1, base_optimizer=INNER)
    with pytest.raises(StructureError, match="updated without the parameters"):
        trained(tx)


def test_many_wrappers_at_once():
    labels = {"dense": {"kernel": "matrix", "bias": "rest"}}
    tx = optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.partition(
                    {
                        "matrix": optax.inject_hyperparams(contrib.prodigy)(learning_rate=0.1),
                        "rest": contrib.mechanize(optax.adam(0.1)),
                    },
                    labels,
                ),
                optax.masked(
                    optax.add_decayed_weights(0.01), {"dense": {"kernel": True, "bias": False}}
                ),
                swa(EVERY),
            ),
            3,
        ),
        2,
    )
    params, state, visited = trained(tx, 6)
    assert n_averaged(state) == 3
    assert_average(state, params, visited[1::2])
    assert_close(finalize(state, params), mean(visited[1::2]))
    assert_close(jax.jit(averaged_params)(state, params), mean(visited[1::2]))
