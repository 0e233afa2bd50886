"""The average in a file: it outlives the process, and others read it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax

import swa_core
from swa_core import EMA, StateError, StructureError, SWAConfig, SWAState
from swa_optax import averaged_params, load_average, save_average, swa

CONFIG = SWAConfig(start="3step", every="2step", rule=EMA(0.6))
SCHEDULE = CONFIG.schedule()
TX = optax.chain(optax.sgd(0.1, momentum=0.9), swa(CONFIG))


def parameters():
    kernel = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7
    return {"dense": {"kernel": kernel, "bias": jnp.ones(3)}}


def trained(params, state, begin, end):
    for update in range(begin, end):
        grads = jax.tree.map(lambda p, u=update: jnp.sin(p * u), params)
        updates, state = TX.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same(some, others):
    assert jax.tree.structure(some) == jax.tree.structure(others)
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_a_training_goes_on_from_the_file_bit_for_bit(tmp_path, at):
    params, state = trained(parameters(), TX.init(parameters()), 0, at)
    save_average(tmp_path / "average", state, CONFIG, schedule=SCHEDULE)
    # The optimizer's own state is saved as always; the average comes from the file.
    resumed = (state[0], TX.init(params)[1])
    resumed = load_average(tmp_path / "average", resumed, config=CONFIG, schedule=SCHEDULE)
    whole = trained(params, state, at, 11)
    again = trained(params, resumed, at, 11)
    same(again[0], whole[0])
    same(again[1], whole[1])


def test_flaxs_reader_finds_the_averages_under_their_paths(tmp_path):
    params, state = trained(parameters(), TX.init(parameters()), 0, 8)
    save_average(tmp_path / "average", state, CONFIG)
    found = safetensors.flax.load_file(tmp_path / "average")
    assert sorted(found) == ["dense/bias", "dense/kernel"]
    average = averaged_params(state, params)
    same(found["dense/bias"], average["dense"]["bias"])
    assert found["dense/kernel"].dtype == jnp.float32


def test_an_average_of_other_names_and_layouts(tmp_path):
    state = SWAState(
        9, 2, 1, 1.6, {"fc.weight": np.ones((3, 2), "f4"), "fc.bias": np.ones(3, "f4")}
    )
    swa_core.save_average(tmp_path / "torch", state, CONFIG, framework="torch")
    names = {"dense/kernel": "fc.weight", "dense/bias": "fc.bias"}
    transform = {"dense/kernel": np.transpose}
    opt_state = TX.init(parameters())
    found = load_average(tmp_path / "torch", opt_state, names=names, transform=transform)
    assert (int(found[1].updates), int(found[1].n_averaged), int(found[1].n_skipped)) == (9, 2, 1)
    np.testing.assert_array_equal(found[1].average["dense"]["kernel"], np.ones((2, 3)))
    same(found[0], opt_state[0])


def test_what_does_not_fit_is_refused(tmp_path):
    params, state = trained(parameters(), TX.init(parameters()), 0, 8)
    file = tmp_path / "average"
    save_average(file, state, CONFIG, schedule=SCHEDULE)
    fresh = TX.init(params)
    with pytest.raises(StateError, match="made with rule"):
        load_average(file, fresh, config=SWAConfig())
    with pytest.raises(StateError, match="made with schedule"):
        load_average(file, fresh, schedule=swa_core.Schedule(5, 1))
    with pytest.raises(StructureError, match="no leaf takes 'dense/bias'"):
        load_average(file, fresh, names={"dense/kernel": "dense/kernel"})
    other = TX.init({"dense": params["dense"]["kernel"]})
    with pytest.raises(StructureError, match="'dense/bias' is missing"):
        load_average(file, other)
    found = swa_core.load_average(file)
    counts = {"dense/bias": (1, 1.0)}
    swa_core.save_average(tmp_path / "counts", found.state, CONFIG, counts=counts)
    with pytest.raises(StructureError, match="'dense/bias' joined it later"):
        load_average(tmp_path / "counts", fresh)
    with pytest.raises(StateError, match="no average"):
        save_average(file, optax.sgd(0.1).init(params), CONFIG)
