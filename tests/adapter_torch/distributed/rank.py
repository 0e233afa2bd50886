"""What each process of a launch does: checks, one after the other, until one fails."""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[Path], None]


def run(checks: dict[str, Check]) -> None:
    """Runs checks on this rank; rank 0 writes down how each went on all of them."""
    results, folder = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("error")
    # torch's own: it checks with a DTensor that is not one of ours, or announces the future.
    for own in ("torch.distributed", "torch.nn", "torch.utils"):
        warnings.filterwarnings("ignore", module=own.replace(".", r"\."))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    went: dict[str, str | None] = dict.fromkeys(checks, "not run: an earlier check failed")
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(folder)
            fault = None
        except BaseException:  # pytest's failures are no Exception
            fault = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        # A rank that failed alone must not leave the others in a collective call for long.
        faults: list[str | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(faults, fault)
        except Exception:
            faults = [fault or f"another rank failed: {traceback.format_exc()}"]
        told = [fault for fault in faults if fault is not None]
        went[name] = "\n".join(told) or None
        if told:
            break
    if dist.get_rank() == 0:
        results.write_text(json.dumps(went))
    dist.destroy_process_group()
