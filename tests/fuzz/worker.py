"""A process that reads mutated files of one kind under a limit of memory, and tells of each."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.formats import FORMATS, Format, contents_of, mutated, put

from swa_core import SWAError, load_average
from swa_core.checkpoints import average
from swa_core.cli.inspect import inspect

BUDGET = 64_000_000  # bytes of memory that a file of a few kilobytes may take
ADDRESSES = 1 << 30  # of addresses beyond what the process has: what is allocated, touched or not


def main() -> None:
    name, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    form = next(form for form in FORMATS if form.name == name)
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        for said in went(form, begin, end, Path(folder), limited()):
            print(json.dumps(said), flush=True)


def went(
    form: Format, begin: int, end: int, folder: Path, limit: AbstractContextManager[None]
) -> Iterator[dict[str, Any]]:
    """How the reading of each file went; before it, that it begins.

    Args:
      form: the kind of checkpoint.
      begin: number of the first file.
      end: the number after that of the last.
      folder: an empty one.
      limit: what is imposed once everything has been imported.
    """
    # Temporary files of the readers, too, must be gone afterwards.
    temporary, work = folder / "temporary", folder / "work"
    temporary.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sound = _sound(form, work)
            yield {"seed": -1}
            with limit:
                for seed in range(begin, end):
                    yield {"seed": seed, **_one(form, sound, work, temporary, seed)}
    finally:
        tempfile.tempdir = before


def _sound(form: Format, work: Path) -> list[dict[str, Any]]:
    """Two checkpoints of the kind; everything that is loaded once has been, afterwards."""
    found = []
    for seed in (1, 2):
        work.mkdir()
        path = work / form.file
        form.make(path, seed)
        found.append(contents_of(path))
        with contextlib.suppress(SWAError):  # of what is not trusted
            _read(form, path, path, work / f"out-{form.file}")
        shutil.rmtree(work)
    return found


def _read(form: Format, one: Path, other: Path, out: Path) -> None:
    key = "model" if form.file.endswith(".bin") else None
    if form.is_average:
        load_average(one if one.name.startswith("bad") else other)
        inspect(one)
    average([one, other], out, key=key, hashes=False, trust=form.trust, integers="last")


def _one(
    form: Format, sound: list[dict[str, Any]], work: Path, temporary: Path, seed: int
) -> dict[str, Any]:
    rng = np.random.default_rng([FORMATS.index(form), seed])
    work.mkdir()
    (work / "secret").write_bytes(b"secret")
    good, bad = work / f"good-{form.file}", work / f"bad-{form.file}"
    put(sound[0], good)
    put(mutated(form, sound[1], rng), bad)
    before = sorted(os.listdir(work))
    first, second = (good, bad) if rng.random() < 0.5 else (bad, good)
    out = work / f"out-{form.file}"
    at_rest, start = _peak(reset=True), time.monotonic()
    fault = None
    try:
        _read(form, first, second, out)
        how = "read"
    except (SWAError, OSError) as error:
        how = "refused"
        if len(str(error)) < 10:
            fault = f"an error that says nothing: {error!r}"
        if sorted(os.listdir(work)) != before:
            fault = f"left behind: {sorted(os.listdir(work))}"
    except BaseException:
        how, fault = "fault", traceback.format_exc()
    seconds, peak = time.monotonic() - start, max(0, _peak() - at_rest)
    if fault is None and [name for name in os.listdir(work) if name.startswith(".")]:
        fault = f"left behind: {sorted(os.listdir(work))}"
    if fault is None and os.listdir(temporary):
        fault = f"left among temporary files: {os.listdir(temporary)}"
    if fault is None and peak > BUDGET:
        fault = f"it took {peak} bytes of memory"
    shutil.rmtree(work)
    return {"went": how, "fault": fault, "seconds": seconds, "peak": peak}


@contextlib.contextmanager
def limited() -> Iterator[None]:
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _peak(*, reset: bool = False) -> int:
    """The most memory that the process has held since the last reset [bytes]."""
    if reset:
        with contextlib.suppress(OSError):  # not every kernel lets one; then it is since the start
            Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
