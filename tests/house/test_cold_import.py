"""Importing one package pulls in its own framework and no other."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "optax", "flax")


def frameworks_after(statement):
    script = f"{statement}; import sys; print(*[m for m in {FRAMEWORKS!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["swa_core", "swa_core.testing", "swa_core.cli"])
def test_the_core_imports_no_framework(module):
    assert frameworks_after(f"import {module}") == set()


def test_the_core_needs_no_pytest():
    assert "pytest" not in frameworks_after(
        "import sys; sys.modules['pytest'] = None; import swa_core.testing"
    )


@pytest.mark.parametrize(
    ("module", "allowed"), [("swa_torch", {"torch"}), ("swa_optax", {"jax", "optax"})]
)
def test_an_adapter_imports_its_own_framework(request, module, allowed):
    skip_unless_chosen(request, module)
    assert frameworks_after(f"import {module}") <= allowed


def test_the_keras_adapter_imports_no_more_than_keras_does(request):
    skip_unless_chosen(request, "swa_keras")
    assert frameworks_after("import swa_keras") == frameworks_after("import keras")


def skip_unless_chosen(request, module):
    if module.removeprefix("swa_") not in request.config.adapters:
        pytest.skip(f"{module} is not among the chosen adapters")
