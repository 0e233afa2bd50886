"""The conformance kit: what every adapter, ours or a stranger's, must pass.

Write a driver (see ``Driver``; ``CoreDriver`` is the shortest example) and run the checks on it,
with pytest::

    @parametrize_with_checks([MyDriver])
    def test_conformance(check):
        check()

or without: ``check_adapter(MyDriver)``.

What holds in every adapter (a check's docstring begins with the number of what it looks at):

1. Snapshots fall on the scheduled updates.
2. The average equals the core's: bit for bit where every way to round agrees, else within 2e-6.
3. The first snapshot is a bit-exact copy, and the average shares no memory with the weights.
4. The training is the one without averaging, bit for bit (unless ``lr`` is set).
5. Swapping in always restores. With nothing averaged yet, reading gives the live weights and warns
   once, and ``finalize()`` is an error; so is an update while the average is swapped in.
6. A run resumed from a saved state equals the uninterrupted one bit for bit.
7. Half precision averages in float32; integers are never averaged, tied weights once, frozen ones
   are left alone.
8. A changed structure, shape or dtype is refused, and nothing is half-done.
9. A snapshot with NaN or Inf leaves the average as it was, and is counted.
10. Skipped updates cost nothing measurable, a snapshot one pass over memory.

The kit cannot see 4 and 10 through a driver: they are for each adapter's own tests and benchmarks.
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
