"""SWAOptimizer on mirrored replicas and on sharded weights, in a process with several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="on torch, replicas are processes: see the callback"
)
def test_replicas_and_shards_hold_the_cores_average():
    paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "adapters")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "adapter_keras.optimizer_on_devices"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip().endswith("agreed"), run.stderr
