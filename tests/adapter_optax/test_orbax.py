"""Saved and restored by Orbax: with a target bit for bit, and what happens without."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from adapter_optax.interrupting import UPDATES, functions, gone_on, same_bits, stages
from flax import nnx

from swa_core import StateError, StructureError, SWAConfig, SWAState
from swa_optax import averaged_params, n_averaged, state_to_dict, swa

pytestmark = pytest.mark.usefixtures("relaxed_jax")

EVERY = SWAConfig(start="1step", every="1step")


@pytest.fixture
def checkpointer():
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


def saved(checkpointer, path, tree):
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()
    return path


def test_a_manager_resumes_any_update_bit_for_bit(tmp_path):
    name = "MultiSteps"
    with ocp.CheckpointManager(tmp_path) as manager:  # which saves asynchronously
        for at in range(1, UPDATES):
            manager.save(at, args=ocp.args.StandardSave(stages(name)[at]))
        manager.wait_until_finished()
        assert manager.latest_step() == UPDATES - 1
        for at in range(1, UPDATES):
            fresh = functions(name)[0](seed=1)
            resumed = manager.restore(at, args=ocp.args.StandardRestore(fresh))
            same_bits(resumed, stages(name)[at])
            same_bits(gone_on(name, resumed, at), stages(name)[-1])


def test_a_target_of_shapes_alone_is_enough(checkpointer, tmp_path):
    stage = stages("chain")[5]
    path = saved(checkpointer, tmp_path / "stage", stage)
    target = jax.eval_shape(functions("chain")[0])
    same_bits(checkpointer.restore(path, target), stage)


def test_the_checkpointer_of_pytrees_resumes_too(tmp_path):
    stage, fresh = stages("inject_hyperparams")[5], functions("inject_hyperparams")[0](seed=1)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stage", stage)
        arguments = ocp.checkpoint_utils.construct_restore_args(fresh)
        resumed = checkpointer.restore(tmp_path / "stage", item=fresh, restore_args=arguments)
    same_bits(gone_on("inject_hyperparams", resumed, 5), stages("inject_hyperparams")[-1])


def test_what_is_being_saved_may_be_donated_meanwhile(tmp_path):
    tx = swa(EVERY)
    params = {"w": jnp.arange(2**20, dtype=jnp.float32)}
    step = jax.jit(tx.update, donate_argnums=(1,))
    state = step(params, tx.init(params), params)[1]
    before = jax.tree.map(np.array, state)
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "state", args=ocp.args.StandardSave(state))
        for _ in range(3):
            _, state = step(params, state, params)
        checkpointer.wait_until_finished()
        args = ocp.args.StandardRestore(tx.init(params))
        same_bits(checkpointer.restore(tmp_path / "state", args=args), before)
    assert n_averaged(state) == 4


def test_a_flax_nnx_optimizer_comes_back_bit_for_bit(checkpointer, tmp_path):
    def fresh(seed):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa(EVERY))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.square(model(x)).sum())(model))

    def train(both, begin, end):
        for update in range(begin, end):
            step(*both, jnp.full((1, 2), jnp.cos(update)))
        return both

    whole = train(fresh(0), 0, 3)
    path = saved(checkpointer, tmp_path / "both", nnx.state(whole))
    resumed = fresh(1)
    nnx.update(resumed, checkpointer.restore(path, nnx.state(resumed)))
    for both in (whole, resumed):
        train(both, 3, 6)
    same_bits(nnx.to_pure_dict(nnx.state(resumed)), nnx.to_pure_dict(nnx.state(whole)))
    assert int(resumed[1].opt_state[1].n_averaged[...]) == 6


# Without a target, or with a wrong one.


def trained(params=None, tx=None):
    params = params or {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3)}}
    tx = tx or optax.chain(optax.sgd(0.1, momentum=0.9), swa(EVERY))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    return tx, optax.apply_updates(params, updates), state


def test_without_a_target_the_error_says_how_and_the_average_can_be_read(checkpointer, tmp_path):
    _, params, state = trained()
    path = saved(checkpointer, tmp_path / "all", {"params": params, "opt_state": state})
    restored = checkpointer.restore(path)
    for read in (lambda s: averaged_params(s, params), state_to_dict, n_averaged):
        with pytest.raises(StateError, match=r"Hint: it was restored without its structure.*Orbax"):
            read(restored["opt_state"])
    with pytest.raises(StateError, match=r"restored without its structure"):
        swa(EVERY).update(params, restored["opt_state"][1], params)
    # As the hint says. The live parameters are one snapshot's, so they are the average.
    average = SWAState(**restored["opt_state"][1])
    same_bits(averaged_params(average, restored["params"]), params)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (
            {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)},
            r"\(2, 4\) is not compatible",
        ),
        (
            {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "more": jnp.ones(1)},
            r"average.dense.more",
        ),
        ({"kernel": jnp.ones((2, 3))}, r"average.dense.bias"),
    ],
    ids=["shape", "added", "removed"],
)
def test_orbax_itself_refuses_a_target_of_other_parameters(checkpointer, tmp_path, dense, message):
    tx, _, state = trained()
    path = saved(checkpointer, tmp_path / "state", state)
    with pytest.raises(ValueError, match=message):
        checkpointer.restore(path, tx.init({"dense": dense}))
    gc.collect()  # what Orbax was reading meanwhile, and leaves unread


def test_what_a_target_has_none_for_is_missed_by_the_next_update(checkpointer, tmp_path):
    tx, params, state = trained()
    path = saved(checkpointer, tmp_path / "state", state)
    partial = tx.init({"dense": params["dense"] | {"bias": None}})
    restored = checkpointer.restore(path, partial)  # Orbax takes it for what is not wanted
    with pytest.raises(StructureError, match="'dense/bias' of dtype float32 is not in the running"):
        swa(EVERY).update(params, restored[1], params)


def test_a_target_of_an_optimizer_without_average_is_refused(checkpointer, tmp_path):
    _, params, state = trained()
    path = saved(checkpointer, tmp_path / "state", state)
    with pytest.raises(ValueError, match="do not match"):
        checkpointer.restore(path, optax.sgd(0.1, momentum=0.9).init(params))


def test_a_target_that_was_cast_is_refused_by_the_next_update(checkpointer, tmp_path):
    tx, params, state = trained()
    path = saved(checkpointer, tmp_path / "state", state)
    restored = checkpointer.restore(path, optax.tree.cast(tx.init(params), jnp.bfloat16))
    with pytest.raises(StateError, match=r"was cast: n_updates has dtype bfloat16"):
        tx.update(params, restored, params)


def test_a_float64_average_is_narrowed_where_jax_has_no_float64(checkpointer, tmp_path):
    with jax.enable_x64(True):
        params = {"w": jnp.full(2, 1 / 3, jnp.float64)}
        tx, params, state = trained(params, swa(EVERY))
        path = saved(checkpointer, tmp_path / "state", state)
        same_bits(checkpointer.restore(path, tx.init(params)), state)
    # Orbax casts to the target without a word; what goes on is an average of float32 parameters.
    with jax.enable_x64(False):
        narrow = {"w": jnp.ones(2, jnp.float32)}
        restored = checkpointer.restore(path, tx.init(narrow))
        assert restored.average["w"].dtype == jnp.float32
        _, restored = tx.update(narrow, restored, narrow)
        assert n_averaged(restored) == 2
