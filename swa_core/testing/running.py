"""Running the checks, with pytest or without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from swa_core.testing.checks import CHECKS, MakeDriver
from swa_core.testing.comparing import ConformanceError


class Result(NamedTuple):
    """What one check gave: its name, the error if it failed, the reason if that was expected.

    >>> print(Result("resume_is_exact", None, None))
    resume_is_exact: passed
    >>> print(Result("resume_is_exact", ValueError("no such key"), None))
    resume_is_exact: FAILED: ValueError: no such key
    """

    name: str
    error: Exception | None
    expected: str | None

    @property
    def conforms(self) -> bool:
        """Whether the check did what was expected of it (an expected failure must fail)."""
        return (self.error is None) == (self.expected is None)

    def __str__(self) -> str:
        if self.expected is None:
            said = "passed" if self.error is None else f"FAILED: {_described(self.error)}"
        elif self.error is None:
            said = f'FAILED: it passes, though expected to fail ("{self.expected}")'
        else:
            said = f"fails as expected ({self.expected})"
        return f"{self.name}: {said}"


def checks_of(make: MakeDriver) -> Iterator[tuple[str, Callable[[], None], str | None]]:
    """The checks for a driver: name, function without arguments, and reason to fail or None.

    Args:
      make: makes a fresh driver at each call; a class will do.

    Raises:
      ValueError: the driver expects failures of checks that do not exist.

    >>> from swa_core.testing import CoreDriver
    >>> name, run, reason = next(checks_of(CoreDriver))
    >>> name, run(), reason
    ('snapshots_on_schedule', None, None)
    """
    expected = dict(make().expected_failures)
    if unknown := expected.keys() - CHECKS.keys():
        raise ValueError(
            f"expected_failures names {sorted(unknown)}, which are no checks; known are "
            f"{', '.join(CHECKS)}"
        )
    for name, check in CHECKS.items():
        yield name, partial(check, make), expected.get(name)


def check_adapter(make: MakeDriver) -> list[Result]:
    """Runs every check on an adapter's driver.

    Args:
      make: makes a fresh driver at each call; a class will do.

    Returns:
      A result for each check.

    Raises:
      ConformanceError: at the end, if any check did not do what was expected of it; it lists all
        of them, and its cause is the error of the first.

    >>> from swa_core.testing import CoreDriver, check_adapter
    >>> all(result.conforms for result in check_adapter(CoreDriver))
    True
    """
    results = []
    for name, run, expected in checks_of(make):
        error: Exception | None = None
        try:
            run()
        except Exception as raised:
            error = raised
        results.append(Result(name, error, expected))
    if failed := [result for result in results if not result.conforms]:
        raise ConformanceError(
            f"{len(failed)} of {len(results)} checks failed\n  " + "\n  ".join(map(str, failed))
        ) from failed[0].error
    return results


def _described(error: Exception) -> str:
    # What the checks themselves say needs no name; anything else came from the driver or adapter.
    return str(error) if isinstance(error, ConformanceError) else f"{type(error).__name__}: {error}"


def parametrize_with_checks(makers: Iterable[MakeDriver]) -> Any:
    """A pytest decorator: one test for each driver and check, for a test with argument ``check``.

    Args:
      makers: driver classes, or functions that make a driver.

    >>> @parametrize_with_checks([])
    ... def test_conformance(check):
    ...     check()
    """
    import pytest  # here, so that the kit runs without it

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                run,
                id=f"{getattr(make, '__name__', 'driver')}-{name}",
                marks=[pytest.mark.xfail(reason=expected, strict=True)] if expected else [],
            )
            for make in makers
            for name, run, expected in checks_of(make)
        ],
    )
