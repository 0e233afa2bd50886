"""What each process of a launch does: checks, one after the other.

Where there are several processes the first failure ends it: what one of them did not do, the
others would wait for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


def prepare(backend: str, rank: int, world: int) -> None:
    """The devices of this process, and its place among the others, before Keras is used."""
    if backend == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
    if backend == "torch":
        import torch

        torch.distributed.init_process_group("gloo")
    if backend == "jax" and world > 1:
        import keras

        keras.utils.set_random_seed(0)
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        keras.distribution.initialize(address, world, rank)


def run(checks: dict[str, Any], results: Path) -> int:
    """Runs the checks and writes down how each went on this process."""
    went: dict[str, str | None] = dict.fromkeys(checks, "not run: an earlier check failed")
    for name, check in checks.items():
        try:
            check()
            went[name] = None
        except BaseException:  # pytest's failures are no Exception
            went[name] = traceback.format_exc()
        results.write_text(json.dumps(went))
        if went[name] and int(os.environ["WORLD_SIZE"]) > 1:
            break
    return int(any(went.values()))


if __name__ == "__main__":
    module, told = sys.argv[1], Path(sys.argv[2]).with_suffix(".json")
    warnings.simplefilter("error")
    # The frameworks' own, also where Keras converts tensors with numpy 2.
    for own in ("keras", "tensorflow", "torch", "jax", "google", "numpy"):
        warnings.filterwarnings("ignore", module=rf"{own}\b")
    warnings.filterwarnings("ignore", message="__array__ implementation")
    prepare(os.environ["KERAS_BACKEND"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    code = run(importlib.import_module(f"adapter_keras.distributed.{module}").CHECKS, told)
    sys.stdout.flush()
    # A process that waits for one that failed, at its end, would hide what was found.
    os._exit(code)
