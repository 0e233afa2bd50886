"""The one suite that every adapter passes."""

from __future__ import annotations

import importlib

from swa_core.testing import CoreDriver, parametrize_with_checks

# Beside the one that is named after its adapter.
MORE = {"keras": ["keras_optimizer"], "optax": ["optax_wrap"]}


def drivers_of(adapter):
    for name in (adapter, *MORE.get(adapter, ())):
        module = importlib.import_module(f"drivers.{name}_driver")
        yield getattr(module, f"{name.title().replace('_', '')}Driver")


def pytest_generate_tests(metafunc):
    ours = [driver for adapter in metafunc.config.adapters for driver in drivers_of(adapter)]
    drivers = [CoreDriver, *ours]
    mark = parametrize_with_checks(drivers)
    metafunc.parametrize(*mark.args, **mark.kwargs)


def test_conformance(check):
    check()
