"""The average on many devices, and in several processes.

How many devices there are is settled when a process starts, so each launch is made once, and every
check of it is a test here.
"""

from __future__ import annotations

import pytest
from processes.launching import Launch, cases

FOLDER = "adapter_optax.distributed"
LAUNCHES = [Launch(FOLDER, "eight_devices", 1, 8), Launch(FOLDER, "two_processes", 2, 2)]


@pytest.mark.parametrize(("which", "name"), cases(LAUNCHES))
def test_devices(launched, which, name):
    fault = launched(which)[name]
    assert fault is None, fault
