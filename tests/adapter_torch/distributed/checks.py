"""All checks of each launch, and the start of each of its processes."""

from __future__ import annotations

import os

from adapter_torch.distributed import (
    checkpoint_checks,
    folder_checks,
    full_state_checks,
    mesh_checks,
    sharded_checks,
    zero_checks,
)

# By the number of ranks they run on. What is saved on two is loaded on one, two and three.
BY_RANKS = {
    2: {
        **checkpoint_checks.SAVING,
        **checkpoint_checks.LOADING,
        **checkpoint_checks.CHECKS,
        **sharded_checks.CHECKS,
        **full_state_checks.CHECKS,
        **zero_checks.CHECKS,
        **folder_checks.SAVING,
        **folder_checks.LOADING,
    },
    1: {**checkpoint_checks.LOADING, **folder_checks.LOADING},
    3: {
        **checkpoint_checks.LOADING,
        **sharded_checks.CHECKS,
        **full_state_checks.CHECKS,
        **folder_checks.LOADING,
    },
    4: mesh_checks.CHECKS,
}

if __name__ == "__main__":
    from adapter_torch.distributed import rank

    rank.run(BY_RANKS[int(os.environ["WORLD_SIZE"])])
