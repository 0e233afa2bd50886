"""One pass over the weights: whether they are finite, and half precision on its way."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from swa_keras.backend import current

BACKEND = keras.backend.backend()
LARGEST = {"float32": 3e38, "float16": 6e4, "bfloat16": 3e38, "float64": 1.7e308}


def variable(values, dtype):
    # (jax has float64 only when it is told so, which a process does once.)
    return keras.Variable(np.asarray(values, "float64"), dtype=dtype)


@pytest.mark.parametrize("dtype", [d for d in LARGEST if (d, BACKEND) != ("float64", "jax")])
def test_all_finite_of_any_dtype_and_size(dtype):
    backend = current()
    fine = variable(np.linspace(-2, 2, 999), dtype)
    # A sum that overflows, which is no infinity of the weights'.
    large = variable([LARGEST[dtype]] * 64, dtype)
    assert backend.all_finite([fine, large])
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 500, 998):
            values = np.zeros(999)
            values[place] = bad
            assert not backend.all_finite([fine, variable(values, dtype)])
            assert not backend.all_finite([large, variable(values, dtype)])
    assert not backend.all_finite([variable([np.inf, -np.inf], dtype)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_averaged_as_if_widened(dtype, monkeypatch):
    if BACKEND == "torch":  # several pieces, and variables that are cut
        monkeypatch.setattr("swa_keras.pieces_torch.ELEMENTS", 64)
    backend = current()
    rng = np.random.default_rng(0)
    variables = [
        variable(rng.normal(size=shape), dtype) for shape in ((7,), (3, 50), (200,), (1, 2, 3), ())
    ]
    variables.append(variable(rng.normal(size=(5, 5)), "float32"))
    averages = backend.copies(variables)
    first = [backend.to_numpy(a) for a in averages]
    for v in variables:
        v.assign(-3 * v)
    averages = backend.lerp(averages, variables, 0.25)
    for v, before, after in zip(variables, first, averages, strict=True):
        new = backend.to_numpy(keras.ops.cast(v.value, "float32"))
        after = backend.to_numpy(after)
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before + 0.25 * (new - before), rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(BACKEND != "torch", reason="the others share memory instead")
def test_values_are_exchanged_in_pieces(monkeypatch):
    monkeypatch.setattr("swa_keras.pieces_torch.ELEMENTS", 64)
    backend = current()
    rng = np.random.default_rng(0)
    variables = [
        variable(rng.normal(size=s), d)
        for s, d in (((7,), "float32"), ((3, 50), "float32"), ((9,), "float16"), ((), "float32"))
    ]
    averages = backend.copies(variables)
    expected = [backend.to_numpy(a) for a in averages]
    for v in variables:
        v.assign(v * 2)
    live = [backend.to_numpy(v.value) for v in variables]
    loan = backend.lend(variables, averages)
    for v, a, was, average in zip(variables, loan.averages, live, expected, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), average)
        np.testing.assert_array_equal(backend.to_numpy(v.value), average.astype(was.dtype))
    np.testing.assert_array_equal(backend.to_numpy(loan.live[2]), live[2])
    assert not loan.undo()
    for v, a, was, average in zip(variables, averages, live, expected, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), average)
        np.testing.assert_array_equal(backend.to_numpy(v.value), was)
