"""The one suite that every adapter passes."""

from __future__ import annotations

import importlib

from swa_core.testing import CoreDriver, parametrize_with_checks


def driver_of(adapter):
    return getattr(
        importlib.import_module(f"drivers.{adapter}_driver"), f"{adapter.capitalize()}Driver"
    )


def pytest_generate_tests(metafunc):
    drivers = [CoreDriver, *map(driver_of, metafunc.config.adapters)]
    mark = parametrize_with_checks(drivers)
    metafunc.parametrize(*mark.args, **mark.kwargs)


def test_conformance(check):
    check()
