"""Which adapters a run tests is said loudly: ``pytest --adapters=torch,optax``.

What is not chosen is not collected, and what is chosen but not installed is an error, so that no
framework is ever skipped in silence.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Each adapter with the packages that its tests import.
NEEDS = {
    "torch": ("torch",),
    "keras": ("keras",),
    "optax": ("jax", "optax", "flax"),
}
BACKENDS = ("tensorflow", "jax", "torch")


def pytest_addoption(parser):
    parser.addoption(
        "--adapters",
        default=",".join(NEEDS),
        help="the adapters to test, comma-separated, or 'none' (default: all)",
    )
    parser.addoption(
        "--keras-backend",
        choices=BACKENDS,
        default=os.environ.get("KERAS_BACKEND", "tensorflow"),
        help="the backend Keras runs on; one for each process (default: $KERAS_BACKEND)",
    )


def pytest_configure(config):
    chosen = config.getoption("--adapters")
    adapters = () if chosen == "none" else tuple(chosen.split(","))
    if unknown := set(adapters) - NEEDS.keys():
        raise pytest.UsageError(f"--adapters: unknown {sorted(unknown)}; known are {list(NEEDS)}")
    backend = config.getoption("--keras-backend")
    for adapter in adapters:
        for package in (*NEEDS[adapter], *([backend] if adapter == "keras" else [])):
            if importlib.util.find_spec(package) is None:
                raise pytest.UsageError(
                    f"--adapters={chosen} needs the package {package}, which is not installed. "
                    f"Install it, or choose fewer adapters."
                )
    config.adapters = adapters
    # Before anything imports Keras, which reads it once.
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_report_header(config):
    return (
        f"adapters: {', '.join(config.adapters) or 'none'}; Keras on {os.environ['KERAS_BACKEND']}"
    )


def pytest_ignore_collect(collection_path, config):
    # Differential tests compare all adapters with each other; the others have a folder each.
    needed = {HERE / f"adapter_{adapter}": {adapter} for adapter in NEEDS}
    needed[HERE / "differential"] = set(NEEDS)
    return True if needed.get(collection_path, set()) - set(config.adapters) else None
