"""NaN and Inf are found in arrays of any size, wherever they are, and large numbers are neither."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swa_core import SWAConfig
from swa_optax import n_skipped, swa
from swa_optax.finite import all_finite

# From 4096 elements on XLA's CPU backend reduces by another library, whose maximum loses NaN.
SIZES = (1, 4095, 4096, 70_000)


def spoilt(array, place, value):
    out = np.array(array)
    out[place] = value
    return jnp.asarray(out)


@pytest.mark.parametrize(("size", "jitted"), [*((size, True) for size in SIZES), (4096, False)])
def test_a_snapshot_with_one_bad_element_is_left_out(size, jitted):
    tx = swa(SWAConfig(start="1step", every="1step"))
    update = jax.jit(tx.update) if jitted else tx.update
    params = {"fine": jnp.ones(3), "w": jnp.ones(size)}
    for bad in (np.nan, np.inf, -np.inf):
        for place in {0, size // 2, size - 1}:
            after = params | {"w": spoilt(params["w"], place, bad)}
            _, state = update({"fine": None, "w": None}, tx.init(params), after)
            assert n_skipped(state) == 1, (bad, place)
            np.testing.assert_array_equal(state.average["w"], 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("size", [7, 5000])
def test_in_every_dtype(dtype, size):
    with jax.enable_x64(True):
        check = jax.jit(all_finite)
        largest = jnp.full(size, jnp.finfo(dtype).max, dtype)
        assert check([largest, -largest])
        bad = [np.nan, -np.inf, *([complex(0, np.nan)] if dtype == "complex64" else [])]
        for value in bad:
            assert not check([largest, spoilt(largest, -1, value)])


def test_sums_that_overflow_or_cancel_are_no_fault_of_the_elements():
    large = jnp.full(10_000, 3e38)
    check = jax.jit(all_finite)
    assert check([large, large])
    assert check([large, -large])
    assert not check([jnp.array(np.inf), jnp.array(-np.inf)])


def test_what_holds_no_element_is_finite():
    check = jax.jit(all_finite)
    assert check([])
    assert check([jnp.zeros((0, 3)), jnp.ones(2)])
