"""These tests run under the strictest configuration of JAX."""

from __future__ import annotations

import contextlib

import jax
import pytest


@contextlib.contextmanager
def promotion(dtypes, ranks):
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield


@pytest.fixture(autouse=True)
def strict_jax():
    """No dtype and no rank is promoted in silence."""
    with promotion("strict", "raise"):
        yield


@pytest.fixture
def relaxed_jax(strict_jax):
    """For what optax and flax themselves promote (MultiSteps multiplies an int by a bool)."""
    with promotion("standard", "allow"):
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    """A test that runs without 64-bit numbers, and with them."""
    with jax.enable_x64(request.param):
        yield request.param
