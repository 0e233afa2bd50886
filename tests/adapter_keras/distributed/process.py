"""A process of a launch, on any backend of Keras."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

from processes.running import run


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
