from __future__ import annotations

import hypothesis
import pytest

# No test may fail because a machine is slow, and none leaves files behind.
hypothesis.settings.register_profile("core", deadline=None, database=None)
hypothesis.settings.load_profile("core")


@pytest.fixture
def jax_strict(request):
    """jax, refusing to mix dtypes by itself; the core's formulas must not ask it to."""
    if "optax" not in request.config.adapters:
        pytest.skip("jax is not chosen by --adapters")
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield jax
