"""Which adapters a run tests is said loudly: ``pytest --adapters=torch,optax``.

``torch-ecosystem`` are the tests of the PyTorch adapter inside packages that take an optimizer.

What is not chosen is not collected, and what is chosen but not installed is an error, so that no
framework is ever skipped in silence.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from processes.launching import Launch, launch

HERE = Path(__file__).parent

# Each adapter with the packages that its tests import.
NEEDS = {
    "torch": ("torch",),
    "keras": ("keras",),
    "optax": ("jax", "optax", "flax", "equinox", "haiku", "chex", "sklearn"),
}
# What the tests of an adapter inside other packages import.
ECOSYSTEMS = {
    "torch-ecosystem": (
        "torch",
        "lightning",
        "transformers",
        "accelerate",
        "schedulefree",
        "timm",
        "sklearn",  # the digits of an example
    ),
}
CHOICES = NEEDS | ECOSYSTEMS
BACKENDS = ("tensorflow", "jax", "torch")


def pytest_addoption(parser):
    parser.addoption(
        "--adapters",
        default=",".join(CHOICES),
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
    choices = () if chosen == "none" else tuple(chosen.split(","))
    if unknown := set(choices) - CHOICES.keys():
        raise pytest.UsageError(f"--adapters: unknown {sorted(unknown)}; known are {list(CHOICES)}")
    backend = config.getoption("--keras-backend")
    for choice in choices:
        for package in (*CHOICES[choice], *([backend] if choice == "keras" else [])):
            if importlib.util.find_spec(package) is None:
                raise pytest.UsageError(
                    f"--adapters={chosen} needs the package {package}, which is not installed. "
                    f"Install it, or choose fewer adapters."
                )
    config.adapters = tuple(choice for choice in choices if choice in NEEDS)
    config.ecosystems = tuple(choice for choice in choices if choice in ECOSYSTEMS)
    # Before anything imports Keras, which reads it once.
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_report_header(config):
    chosen = ", ".join((*config.adapters, *config.ecosystems)) or "none"
    return f"adapters: {chosen}; Keras on {os.environ['KERAS_BACKEND']}"


def pytest_ignore_collect(collection_path, config):
    # Differential tests compare all adapters with each other; the others have a folder each.
    needed = {HERE / f"adapter_{adapter}": {adapter} for adapter in NEEDS}
    needed[HERE / "differential"] = set(NEEDS)
    # The evidence is of all of them, and computes with scipy.
    for folder in ("correctness", "evidence", "experiments", "speed"):
        needed[HERE / folder] = set(NEEDS)
    needed[HERE / "ecosystem_torch"] = {"torch-ecosystem"}
    chosen = {*config.adapters, *config.ecosystems}
    return True if needed.get(collection_path, set()) - chosen else None


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """What the checks of a launch came to."""
    folder = tmp_path_factory.mktemp("processes")
    done: dict[Launch, dict[str, str | None]] = {}

    def of(which: Launch) -> dict[str, str | None]:
        if which not in done:
            done[which] = launch(which, folder)
        return done[which]

    return of
