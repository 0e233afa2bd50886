"""Runs the parts, and keeps what they gave in the folder of the run, so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import command
import machine

from speed.parts import FOLDER, Part

# A part that takes this long hangs [s].
LONGEST = 3600
# Cores that others kept busy, and the load before a run, above which it is marked.
BUSY = 0.15
LOADED = 0.5


def run(part: Part, folder: Path, rounds: int, *, quick: bool) -> dict[str, Any]:
    """What a part gave: measured now, or before in this folder.

    Returns:
      Its record: "part", "growth", "command", "seconds", "cpu" (seconds of all its threads),
      "load_before", "load_after", "others" (cores that others kept busy), "found" (its JSON) or
      "failed" (why there is none), and whether it was "resumed".
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, found = folder / f"{part.title}.json", folder / f"{part.title}.figures.json"
    arguments = part.arguments(rounds, found, quick=quick)
    shown = [Path(arguments[1]).name, *arguments[2:]]
    shown = [word for word in shown if word not in ("--json", str(found))]
    key = fingerprint(shown, part)
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["key"] == key:
            return record | {"resumed": True}
    record = {"part": part.name, "growth": part.is_growth, "command": shown, "key": key}
    why = part.missing()
    if why is not None:
        return record | {"failed": why, "resumed": False}

    record |= {"load_before": command.load()}
    begin, others, own = time.monotonic(), machine.Others(), machine.own_seconds()
    log = folder / f"{part.title}.log"
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **part.environment}
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                arguments, stdout=output, stderr=output, env=environment, timeout=LONGEST
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    record |= {
        "seconds": time.monotonic() - begin,
        "cpu": machine.own_seconds() - own,
        "load_after": command.load(),
        "others": others.cores(),
    }
    if code != 0:
        ended = f"took longer than {LONGEST} s" if code is None else f"ended with {code}"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = f": {lines[-1][:200]}" if lines else ""
        return record | {"failed": f"{shown[0]} {ended}{said} (all of it: {log.name})"}
    record["found"] = json.loads(found.read_text(encoding="utf-8"))
    part_of_it = file.with_suffix(".part")
    part_of_it.write_text(json.dumps(record) + "\n", encoding="utf-8")
    part_of_it.replace(file)
    found.unlink()
    return record | {"resumed": False}


def fingerprint(shown: list[str], part: Part) -> str:
    """Of all that a part's figures depend on: its command, the code and the packages."""
    digest = hashlib.sha256(json.dumps([shown, dict(part.environment)]).encode())
    root = FOLDER.parent
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("*.c"), *(root / "swa_core").rglob("*.py")]
    files += (root / "adapters").rglob("*.py")
    for file in sorted(files):
        if file.name != "speed.py":  # which measures nothing
            digest.update(file.read_bytes())
    installed = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
    digest.update(json.dumps(installed).encode())
    return digest.hexdigest()[:16]


def disturbed(records: list[dict[str, Any]]) -> list[str]:
    """Why the figures are not to be trusted: what else the machine did. Nothing if it was quiet."""
    out = []
    measured = [record for record in records if "seconds" in record]
    if measured and (measured[0]["load_before"] or 0) > LOADED:
        out.append(f"the load before the first part was {measured[0]['load_before']:.1f}")
    for record in measured:
        name = f"growth-{record['part']}" if record["growth"] else record["part"]
        if record["others"] is None:
            out.append(f"{name}: what others did cannot be known on this system")
        elif record["others"] > BUSY:
            out.append(f"{name}: others kept {record['others']:.1f} cores busy meanwhile")
    return out
