"""Runs the checks of ``checks.py`` on several processes and tells of each how it went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def launch(ranks: int, folder: Path) -> dict[str, str | None]:
    """Starts the processes by torchrun: each check with the traceback of its failure, if any.

    Args:
      ranks: number of processes; they talk over gloo.
      folder: where checks leave files for each other, also for those of other launches.
    """
    results = folder / f"results-{ranks}.json"
    paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "adapters")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        # With more threads the processes would wait for each other's.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "adapter_torch.distributed.checks"]
    done = subprocess.run(
        [*command, str(results), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if not results.exists():
        raise RuntimeError(f"the checks on {ranks} ranks ended early:\n{done.stderr[-5000:]}")
    found: dict[str, str | None] = json.loads(results.read_text())
    return found
