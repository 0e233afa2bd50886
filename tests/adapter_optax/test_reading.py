"""Reading the average out: structures, dtypes, and what there is before the first snapshot."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import NothingAveragedError, StateError, StructureError, SWAConfig, SWAWarning
from swa_optax import averaged_params, finalize, n_averaged, n_skipped, swa

CONFIG = SWAConfig(start="2step", every="1step")
ZERO = {"w": jnp.zeros(2, jnp.bfloat16), "steps": jnp.array(0)}


def after(n, config=CONFIG):
    tx = optax.chain(optax.scale(1), swa(config))
    params = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.array(0)}
    state = tx.init(params)
    for update in range(1, n + 1):
        params = {"w": jnp.full(2, update, jnp.bfloat16), "steps": jnp.array(update)}
        _, state = tx.update(ZERO, state, params)
    return state, params


def test_reads_in_the_dtypes_of_the_live_parameters():
    state, params = after(4)
    for read in (averaged_params, jax.jit(averaged_params), finalize):
        got = read(state, params)
        assert got["w"].dtype == jnp.bfloat16
        assert got["w"].tolist() == [3, 3]
        assert int(got["steps"]) == 4
    full = averaged_params(state, {"w": jnp.zeros(2, jnp.float32), "steps": 4})
    assert full["w"].dtype == jnp.float32
    assert (n_averaged(state), n_skipped(state)) == (3, 0)
    assert type(n_averaged(state)) is int


def test_before_the_first_snapshot_the_live_parameters_with_one_warning():
    state, params = after(1)
    with pytest.warns(SWAWarning, match="nothing is averaged yet") as caught:
        assert averaged_params(state, params) is params
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert averaged_params(state, params) is params  # once in a training, whatever the filter
        read = jax.jit(averaged_params)(state, params)  # and never inside of jit
    assert read["w"].tolist() == [1, 1]
    state, params = after(1)
    with pytest.warns(SWAWarning):  # a new training warns again
        averaged_params(state, params)


def test_finalize_before_the_first_snapshot_is_an_error():
    with pytest.raises(NothingAveragedError, match="nothing is averaged after 1 updates"):
        finalize(*after(1))
    tx = swa(CONFIG)
    params = {"w": jnp.full(2, np.nan)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": jnp.zeros(2)}, state, params)
    with pytest.raises(NothingAveragedError, match="2 snapshots held NaN or Inf"):
        finalize(state, params)


def test_finalize_inside_of_jit_is_an_error():
    with pytest.raises(StateError, match="inside of jit") as error:
        jax.jit(finalize)(*after(4))
    assert "averaged_params" in str(error.value)


@pytest.mark.parametrize("read", [averaged_params, finalize])
def test_a_state_without_average_is_an_error(read):
    state = optax.adam(0.1).init(ZERO)
    with pytest.raises(StateError, match=r"no average.\nHint: put swa_optax.swa\(config\) last"):
        read(state, ZERO)
    with pytest.raises(StateError, match="no average"):
        n_averaged(state)


def test_several_averages_are_an_error_that_names_their_places():
    tx = optax.chain(optax.scale(1), optax.chain(swa(CONFIG), swa(CONFIG)))
    state = tx.init(ZERO)
    with pytest.raises(
        StateError, match=r"2 averages: opt_state\[1\]\[0\], opt_state\[1\]\[1\]"
    ) as e:
        averaged_params(state, ZERO)
    assert "Hint: pass the part of the state" in str(e.value)
    assert n_averaged(state[1][0]) == 0


def test_other_parameters_are_refused_with_the_path():
    state, params = after(4)
    with pytest.raises(StructureError, match=r"leaf 'w' has shape \(3,\).*holds \(2,\)"):
        averaged_params(state, params | {"w": jnp.zeros(3)})
    for other in ({"v": jnp.zeros(2)}, {"w": jnp.zeros(2, jnp.int32)}):
        with pytest.raises(StructureError, match="no floating-point leaf 'w'"):
            averaged_params(state, other)
    # What would fail later fails at once, before the first snapshot too.
    state, _ = after(1)
    with pytest.raises(StructureError):
        averaged_params(state, {"v": jnp.zeros(2)})


def test_the_state_of_an_ensemble_is_refused_with_the_way_to_read_it():
    state = jax.vmap(swa(CONFIG).init)({"w": jnp.zeros((3, 2))})
    with pytest.raises(StateError, match=r"Hint: map over its members: jax.vmap"):
        averaged_params(state, {"w": jnp.zeros((3, 2))})


def test_reading_changes_nothing_and_shares_nothing():
    state, params = after(4)
    read = averaged_params(state, params | {"w": jnp.zeros(2, jnp.float32)})
    held = state[1].average["w"]
    assert read["w"].unsafe_buffer_pointer() != held.unsafe_buffer_pointer()
    assert params["w"].tolist() == [4, 4]
