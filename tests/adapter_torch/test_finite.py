"""Only NaN and Inf make weights not finite, wherever and in whatever dtype they stand."""

from __future__ import annotations

import pytest
import torch

from swa_torch.finite import all_finite

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_found(dtype, bad):
    spoilt = torch.ones(5, 7, dtype=dtype)
    spoilt[3, 2] = bad
    for tensors in ([spoilt], [torch.ones(3), spoilt.t(), torch.zeros(0)], [spoilt[:, ::2]]):
        assert not all_finite(tensors)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_the_largest_numbers_are_finite(dtype):
    # Their squares are not.
    largest = torch.full((4, 6), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([largest, -largest, largest.t()])
    spoilt = largest.clone()
    spoilt[0, 0] = float("inf")
    assert not all_finite([largest, spoilt])


def test_nothing_is_finite():
    assert all_finite([])
    assert all_finite([torch.zeros(0)])
