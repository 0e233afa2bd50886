"""What each process of a launch does: checks, one after the other.

Where there are several processes the first failure ends it: what one of them did not do, the
others would wait for.
"""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any


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
