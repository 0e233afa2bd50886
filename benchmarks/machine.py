"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def description(packages: list[str]) -> dict[str, object]:
    """The machine, the versions of the packages that are installed, and how busy it is."""
    torch = sys.modules.get("torch")  # which not every benchmark is about
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory": memory(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **({} if torch is None else _torch(torch)),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def short_name(about: Mapping[str, Any]) -> str:
    """A name for files, of what is described; no host's.

    >>> short_name({"cpu": "AMD EPYC (Milan) @ 2.4", "cores": 2, "memory": 25, "system": "Linux x"})
    'amd-epyc-milan-2-4-2-cores'
    """
    words = re.findall(r"[a-z0-9]+", f"{about['cpu']} {about['cores']} cores".lower())
    return "-".join(words)


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of machines whose figures can be compared."""
    return all(one.get(key) == other.get(key) for key in ("cpu", "cores", "memory", "system"))


class Others:
    """How busy the rest of the machine is meanwhile, going by the kernel's accounts.

    What this process and the children it has waited for used is left out; what a hypervisor gave
    to others is not.
    """

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy, self._own = _busy(), own_seconds()

    def cores(self) -> float | None:
        """So many cores were kept busy by others since the start; None where it cannot be known."""
        busy = _busy()
        if busy is None or self._busy is None:
            return None
        seconds = time.monotonic() - self._begin
        return max(0.0, (busy - self._busy - (own_seconds() - self._own)) / seconds)


def _busy() -> float | None:
    """Seconds that all cores have worked, since the machine started."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Of computing, of this process and the children that it has waited for, on all cores."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cores() -> int | None:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def memory() -> int | None:
    """Of the machine [GB]."""
    whole = _meminfo("MemTotal")
    return None if whole is None else round(whole / 1e9)


def free_memory() -> int | None:
    """What could be taken, the page cache among it [bytes]; None where the system does not say."""
    return _meminfo("MemAvailable")


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _torch(torch: Any) -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
