"""All checks of one process with eight devices."""

from __future__ import annotations

from adapter_optax.distributed import sharded

CHECKS = {**sharded.CHECKS}
