"""A process of a launch: JAX as strict as it can be, and its place among the others."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import jax
from processes.running import run

if __name__ == "__main__":
    module, told = sys.argv[1], Path(sys.argv[2]).with_suffix(".json")
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        jax.distributed.initialize(address, world, int(os.environ["RANK"]))
    code = run(importlib.import_module(f"adapter_optax.distributed.{module}").CHECKS, told)
    sys.stdout.flush()
    # A process that waits for one that failed, at its end, would hide what was found.
    os._exit(code)
