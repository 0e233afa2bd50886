"""Runs checks in processes with device settings of their own, and tells of each how it went."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 400  # a hang is a failure, and a machine may be slow


class Launch(NamedTuple):
    """Processes that run the checks of one module.

    Attributes:
      folder: of tests, as a package, with a module ``process`` that is what is run.
      module: in this folder, with a dict CHECKS.
      processes: how many, which talk over gloo.
      devices: CPU devices of each.
    """

    folder: str
    module: str
    processes: int
    devices: int


def cases(launches: list[Launch]) -> list[Any]:
    """Parameters of a test: every check of every launch."""
    return [
        pytest.param(what, name, id=f"{what.module}-{name}")
        for what in launches
        for name in importlib.import_module(f"{what.folder}.{what.module}").CHECKS
    ]


def launch(what: Launch, folder: Path) -> dict[str, str | None]:
    """Each check with the traceback of its failure on some process, or None."""
    paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "adapters")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        # Most of the time goes into compiling, for models that take no time to run.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={what.devices} "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        # With more threads the processes would wait for each other's.
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(what.processes),
    }
    started = []
    for rank in range(what.processes):
        told = folder / f"{what.module}-{rank}"
        with told.with_suffix(".txt").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{what.folder}.process", what.module, str(told)],
                env={**environment, "RANK": str(rank)},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append((process, told))
    _wait([process for process, _ in started])
    found: dict[str, str | None] = {}
    for process, told in started:
        results = told.with_suffix(".json")
        if not results.exists():
            said = told.with_suffix(".txt").read_text()[-5000:]
            raise RuntimeError(f"{told.name} ended early with {process.returncode}:\n{said}")
        for name, fault in json.loads(results.read_text()).items():
            faults = [found.get(name), fault and f"process {told.name}: {fault}"]
            found[name] = "\n".join(filter(None, faults)) or None
    return found


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; one that failed must not leave the others waiting for it for long."""
    end = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
