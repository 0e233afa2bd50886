"""Version 1 of the state: its fields are frozen, and what was saved in it once must load for ever.

The golden files below are what this version wrote. If a test here fails, the change breaks every
checkpoint out there: raise ``swa_core.saving.VERSION`` and read both.
"""

from __future__ import annotations

import base64
import zlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_core
from swa_core import EMA, StateError, SWAConfig, SWAState
from swa_optax import load_average, save_average, state_from_dict, state_to_dict, swa

CONFIG = SWAConfig(start="2step", every="3step", rule=EMA(0.75))
AVERAGE = {"dense": {"bias": np.float32([0.5, -0.0]), "kernel": np.float32([[1.25, 1 / 3]])}}
STATE = SWAState(9, 2, 1, 1.75, AVERAGE | {"step": None})


def params():
    return jax.tree.map(jnp.zeros_like, AVERAGE) | {"step": jnp.array(9)}


def golden():
    return jax.tree.map(jnp.asarray, STATE)._replace(
        n_updates=jnp.int32(9),
        n_averaged=jnp.int32(2),
        n_skipped=jnp.int32(1),
        total=jnp.float32(1.75),
    )


def same(state):
    assert type(state) is SWAState
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(golden()), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    assert jax.tree.structure(state) == jax.tree.structure(golden())


def packed(data):
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text):
    return zlib.decompress(base64.b64decode(text))


# Made by ``pytest tests/adapter_optax/test_version_1.py -k written_today`` of this version, which
# prints what it finds where it differs.
GOLDEN = {
    "flax bytes": (
        "eNprXZkXX1qQkliSWnycj3HyhKWZeSXGRkdYOBkYGFblxSeWpRYlpqemoMgxAeWA2oqzMwsK0KQYgVJLS/JLEnNu"
        "AEWXp+XkJ4LFGRge2C+HGta0NCU1rzi1aUlSZmLxcVHGyROZ4Ao5gPrtgbhhWXZqUV5qznExxsmTGFHkF9ivXrXK"
        "bklxSWrBAQBbBEau"
    ),
    "dictionary": (
        "eNrrWJ5YllqUmJ7atColNa84VT8pM7H4uCjj5IlMy9Ny8hNLjI2OcDAwMNgDccMaiJLs1KK81JzjYoyTJzGiqFpg"
        "v3rVKrtVefFQM1OYVubFF2dnFhSkpjACmaUFKYklqcWcS4pKc1KblqakJidWnrZ/wQAGS/ISc1MXp+YmrihOzkhN"
        "AaqYzMR8YGlJfklizmn7PxBFy4EGF2fm5zECABnzRTM="
    ),
    "safetensors": (
        "eNqVksFugzAMhqs9SZQzYkC3rtthve0lCkJpMS0rhCgJa1GFtEfZuXuRPdbiOFJ3mCYNCQl/9v/bWP66mfnnzMuy"
        "AysqYUVZ8id25nWvO2HdJ1eWR4ybo8DgnPM30KbpZe7CNGI5l+WgnBAMkkciwhWJHVSIMkLm0ChFxMtsb0Xro/jh"
        "HoHZ7qEaWkC2dqJ5xOTQtgXmdOCuvRSd/8w5dCLnmK1gK0ZkibOakGx7WTe7oDBWaEuSzFhQJAI34kh0fqX/bSSx"
        "kWxsqMSfzLnP1Nrpj70+UKZXVpzIJSzQhD5qtHtap5skTt06qMxtvNz2OjgncRonlJBDp8LkWXwXL4i+on2oTOKM"
        "YOhKOIuXYTY4WS18ex9uwDQV7b2g7XWqhVOaLX+yQVoaeZrQxS1DGrjdNML4g6nsqABP5GWe+YPZCx+vswKL8bL6"
        "ujZgsXydRGxZXF0OoCW0f/u4q/nVahmxdFFME2PMnfLKve+z2cfq83J5/gZOlth2"
    ),
}


def test_the_fields_their_order_and_dtypes():
    assert SWAState._fields == ("n_updates", "n_averaged", "n_skipped", "total", "average")
    for init in (swa(CONFIG).init, jax.jit(swa(CONFIG).init)):
        state = init(params())
        assert [leaf.dtype for leaf in state[:4]] == [np.int32] * 3 + [np.float32]
        assert [leaf.shape for leaf in state[:4]] == [()] * 4
        assert state.average["dense"]["kernel"].dtype == np.float32
        assert state.average["step"] is None
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        same_after_a_step(state)
    # The fields are attributes of a path, for Orbax and for optax.tree.get.
    names = [path[0].name for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert names == ["n_updates", "n_averaged", "n_skipped", "total", "average", "average"]
    for name in SWAState._fields[:4]:
        assert optax.tree.get(optax.chain(optax.adam(0.1), swa(CONFIG)).init(params()), name) == 0


def same_after_a_step(state):
    _, after = jax.jit(swa(CONFIG).update)(params(), state, params())
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("complex128", "complex128"),
    ],
)
def test_the_dtypes_of_averages(dtype, kept):
    with jax.enable_x64(True):
        state = swa(CONFIG).init({"w": jnp.zeros(2, dtype)})
        assert state.average["w"].dtype == kept
        assert [leaf.dtype for leaf in state[:4]] == [np.int32] * 3 + [np.float32]


def dictionary():
    saved = state_to_dict(golden(), schedule=CONFIG.schedule(), rule=CONFIG.rule)
    return {key: value for key, value in saved.items() if key != "average"}, saved["average"]


def written(form, tmp_path):
    if form == "flax bytes":
        return flax.serialization.to_bytes(golden())
    if form == "dictionary":
        header, arrays = dictionary()
        return flax.serialization.msgpack_serialize(header | {"average": arrays})
    save_average(tmp_path / "average", golden(), CONFIG, schedule=CONFIG.schedule())
    return (tmp_path / "average").read_bytes()


def read(form, data, tmp_path):
    fresh = swa(CONFIG).init(params())
    if form == "flax bytes":
        return flax.serialization.from_bytes(fresh, data)
    if form == "dictionary":
        saved = flax.serialization.msgpack_restore(data)
        return state_from_dict(saved, fresh, schedule=CONFIG.schedule(), rule=CONFIG.rule)
    (tmp_path / "golden").write_bytes(data)
    return load_average(tmp_path / "golden", fresh, config=CONFIG, schedule=CONFIG.schedule())


@pytest.mark.parametrize("form", GOLDEN)
def test_the_golden_file_loads(form, tmp_path):
    assert len(GOLDEN[form]) < 2000
    same(read(form, unpacked(GOLDEN[form]), tmp_path))


@pytest.mark.parametrize("form", ["flax bytes", "dictionary"])
def test_what_is_written_today_is_the_golden_file(form, tmp_path):
    # Not so of safetensors, where the versions of the libraries stand.
    data = written(form, tmp_path)
    assert data == unpacked(GOLDEN[form]), packed(data)


def test_a_newer_version_is_refused_with_guidance(tmp_path):
    fresh = swa(CONFIG).init(params())
    newer = state_to_dict(golden()) | {"version": swa_core.saving.VERSION + 1}
    with pytest.raises(StateError, match=r"has version 2, .*reads up to 1.\nHint: update swa-core"):
        state_from_dict(newer, fresh)
    data = unpacked(GOLDEN["safetensors"]).replace(b'\\"version\\": 1', b'\\"version\\": 2')
    (tmp_path / "newer").write_bytes(data)
    with pytest.raises(StateError, match=r"version 2.*(?s:.)*update swa-core"):
        load_average(tmp_path / "newer", fresh)
    with pytest.raises(StateError, match=r"version 2.*(?s:.)*update swa-core"):
        swa_core.load_average(tmp_path / "newer")
