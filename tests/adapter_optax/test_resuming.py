"""Interrupted at any update and resumed from any form of saved state: bit for bit the whole run."""

from __future__ import annotations

import io
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_optax.interrupting import (
    CONFIGS,
    UPDATES,
    Stage,
    functions,
    gone_on,
    inputs,
    same_bits,
    stages,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import swa_core
from swa_optax import load_average, n_averaged, n_skipped, save_average, state_from_dict
from swa_optax import state_to_dict as to_dict
from swa_optax.checking import is_state
from swa_optax.finding import find_state

pytestmark = pytest.mark.usefixtures("relaxed_jax")


def through_pickle(stage, fresh, name):
    # On the host, as it is pickled from one machine to another.
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, stage)))


def through_pickled_arrays(stage, fresh, name):
    return pickle.loads(pickle.dumps(stage))


def through_npz(stage, fresh, name):
    file = io.BytesIO()
    # numpy's files know no bfloat16: its bits are saved, and read as what the fresh leaf is.
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(stage)]
    np.savez(file, *[leaf.view("u2") if leaf.dtype == jnp.bfloat16 else leaf for leaf in leaves])
    file.seek(0)
    saved = np.load(file)
    likes = jax.tree.leaves(fresh)
    leaves = [saved[f"arr_{n}"].view(like.dtype) for n, like in enumerate(likes)]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def through_flax_bytes(stage, fresh, name):
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(stage))


def through_flax_dicts(stage, fresh, name):
    saved = flax.serialization.to_state_dict(stage)
    saved = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(saved))
    return flax.serialization.from_state_dict(fresh, saved)


def settings_of(name):
    return {"schedule": CONFIGS[name].schedule(), "rule": CONFIGS[name].rule}


def through_own_dict(stage, fresh, name):
    # The average by itself; what else the optimizer has goes another way.
    saved = pickle.loads(pickle.dumps(to_dict(stage.state, **settings_of(name))))
    emptied = state_from_dict(to_dict(fresh.state), stage.state)
    return Stage(stage.params, state_from_dict(saved, emptied, **settings_of(name)))


def through_the_cores_dict(stage, fresh, name):
    average = find_state(stage.state)
    saved = swa_core.state_to_dict(jax.tree.map(np.asarray, average))
    weights = jax.tree.map(np.asarray, find_state(fresh.state).average)
    found = swa_core.state_from_dict(saved, weights)
    state = jax.tree.map(lambda s: found if is_state(s) else s, stage.state, is_leaf=is_state)
    counts = found[:3]
    assert all(type(count) is int for count in counts)
    return Stage(stage.params, state)


def through_a_file(tmp_path):
    def through(stage, fresh, name):
        config = CONFIGS[name]
        save_average(tmp_path / "average", stage.state, config, schedule=config.schedule())
        emptied = state_from_dict(to_dict(fresh.state), stage.state)
        loaded = load_average(
            tmp_path / "average", emptied, config=config, schedule=config.schedule()
        )
        return Stage(stage.params, loaded)

    return through


FORMS = {
    "pickle": through_pickle,
    "pickled arrays": through_pickled_arrays,
    "npz": through_npz,
    "flax bytes": through_flax_bytes,
    "flax dicts": through_flax_dicts,
    "own dict": through_own_dict,
    "core's dict": through_the_cores_dict,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_uninterrupted_runs_skip_some_snapshots_and_take_others(name):
    state = stages(name)[-1].state
    assert n_averaged(state) >= 3
    assert n_skipped(state) >= 1


@pytest.mark.parametrize("name", CONFIGS)
@given(st.integers(0, UPDATES - 1), st.sampled_from(sorted(FORMS)))
@settings(max_examples=20, deadline=None)
def test_resumed_at_any_update_it_is_the_uninterrupted_run(name, at, form):
    stage = stages(name)[at]
    resumed = FORMS[form](stage, functions(name)[0](seed=1), name)
    if form != "core's dict":  # whose counters are Python's
        same_bits(resumed, stage)
    same_bits(gone_on(name, resumed, at), stages(name)[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_average_from_a_file_goes_on_at_any_update(name, tmp_path):
    for at in range(UPDATES):
        stage = stages(name)[at]
        resumed = through_a_file(tmp_path)(stage, functions(name)[0](seed=1), name)
        same_bits(gone_on(name, resumed, at), stages(name)[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_out_of_the_middle_of_an_epoch_that_is_one_scan(name):
    init, _, scan = functions(name)
    xs, at = inputs(), UPDATES // 2  # for MultiSteps in the middle of its steps, too
    part = scan(init(), jax.tree.map(lambda x: x[:at], xs))
    resumed = through_flax_bytes(part, init(seed=1), name)
    rest = scan(resumed, jax.tree.map(lambda x: x[at:], xs))
    same_bits(rest, scan(init(), xs))


def test_a_saved_state_goes_on_in_the_compiled_step_that_saved_it():
    _, step, _ = functions("chain")
    before = step._cache_size()
    stage = stages("chain")[4]
    fresh = functions("chain")[0](seed=1)
    for form in ("npz", "flax bytes", "own dict", "pickled arrays"):
        gone_on("chain", FORMS[form](stage, fresh, "chain"), UPDATES - 1)
    assert step._cache_size() == max(before, 1)
