"""All checks of each launch, and the start of each of its processes."""

from __future__ import annotations

import os

from adapter_torch.distributed import sharded_checks

# By the number of ranks they run on.
BY_RANKS = {2: sharded_checks.CHECKS, 3: sharded_checks.CHECKS}

if __name__ == "__main__":
    from adapter_torch.distributed import rank

    rank.run(BY_RANKS[int(os.environ["WORLD_SIZE"])])
