"""What has been computed once: a JSON file for each configuration, named by its hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Cache:
    """Results in a folder. One file per result, so that an interrupted run loses the one in work.

    >>> import tempfile
    >>> cache = Cache(Path(tempfile.mkdtemp()))
    >>> key = cache.key({"seed": 1, "rate": 0.1})
    >>> key == cache.key({"rate": 0.1, "seed": 1})
    True
    >>> cache.load(key) is None
    True
    >>> cache.store(key, {"accuracy": 90.5})
    >>> cache.load(key)
    {'accuracy': 90.5}
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(configuration: Mapping[str, Any]) -> str:
        """A name for all that a result depends on; the order of the keys is not part of it."""
        text = json.dumps(configuration, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, key: str) -> Path:
        """Where a result lies, or would."""
        return self.folder / f"{key}.json"

    def load(self, key: str) -> dict[str, Any] | None:
        """The result, or None if there is none yet."""
        try:
            return json.loads(self.path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def store(self, key: str, result: Mapping[str, Any]) -> None:
        """Keeps a result, whole or not at all."""
        path = self.path(key)
        # Of a name of its own: two processes may compute the same.
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
