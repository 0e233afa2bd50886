"""All checks of one process with eight devices: what costs is to start it."""

from __future__ import annotations

from adapter_optax.distributed import batch_statistics, cached, mapped, sharded, stored

CHECKS = {
    **sharded.CHECKS,
    **mapped.CHECKS,
    **stored.CHECKS,
    **batch_statistics.CHECKS,
    **cached.CHECKS,
}
