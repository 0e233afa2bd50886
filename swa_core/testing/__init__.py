"""The conformance kit: what every adapter, ours or a stranger's, must pass.

Write a driver (see ``Driver``; ``CoreDriver`` is the shortest example) and run the checks on it,
with pytest::

    @parametrize_with_checks([MyDriver])
    def test_conformance(check):
        check()

or without: ``check_adapter(MyDriver)``.
"""

from swa_core.testing.checks import CHECKS
from swa_core.testing.comparing import ConformanceError
from swa_core.testing.driver import Driver, Weights
from swa_core.testing.reference import CoreDriver
from swa_core.testing.running import Result, check_adapter, checks_of, parametrize_with_checks

__all__ = [
    "CHECKS",
    "ConformanceError",
    "CoreDriver",
    "Driver",
    "Result",
    "Weights",
    "check_adapter",
    "checks_of",
    "parametrize_with_checks",
]
