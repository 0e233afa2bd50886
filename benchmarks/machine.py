"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys
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
