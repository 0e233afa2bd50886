"""Memory and page faults of averaging, each contender in a process of its own.

    python benchmarks/memory.py '[["gpt2", "float32", "AveragedModel"]]' [--tiny]

One process imports everything and computes nothing; it forks a child for each contender, so that
none inherits another's heap or threads. What the kernel says of a child's resident memory is what
counts, not what anybody's allocator reports. Prints a line of JSON for each request.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

STATUS = Path("/proc/self/status")
# Writing 5 there sets the peak back to what is resident now.
CLEAR_REFS = Path("/proc/self/clear_refs")
UPDATES = 5

Request = tuple[str, str, str]


class Figures(TypedDict, total=False):
    """What was measured of a contender; in copies of the weights in float32, and in faults.

    Attributes:
      held: what the average keeps, from update to update.
      peak: what an update takes besides, while it runs.
      swap_peak: what swapping in, and out again, takes besides.
      faults: minor page faults of an update.
      failed: why there are no figures.
    """

    held: float
    peak: float
    swap_peak: float
    faults: float
    failed: str


def measure_all(requests: Sequence[Request], *, tiny: bool = False) -> list[Figures]:
    """The figures of each request (set, dtype, contender), from processes of their own."""
    if not CLEAR_REFS.exists():
        return [Figures(failed="needs Linux") for _ in requests]
    command = [sys.executable, __file__, json.dumps(requests), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(name: str, dtype: str, contender: str, *, tiny: bool) -> Figures:
    """The figures of one contender, in this process, which has measured nothing before."""
    import torch
    from torch_peers import by_name
    from torch_sets import elements, fill, shapes_of

    torch.set_num_threads(1)  # two that wait for each other are slow on a busy machine
    # What the first use of anything loads is no average.
    small = fill(torch.nn.Module(), {"weight": (1,)}, torch.float32)
    by_name(contender).build(small).update()
    shapes = shapes_of(name, tiny=tiny)
    copy = 4 * elements(shapes)
    module = fill(torch.nn.Module(), shapes, getattr(torch, dtype))
    give_back()
    before = kilobytes("VmRSS")
    running = by_name(contender).build(module)
    for _ in range(2):
        running.update()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(UPDATES):
        running.update()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    give_back()
    figures = Figures(
        held=1024 * (kilobytes("VmRSS") - before) / copy,
        faults=faults / UPDATES,
        peak=peak_of(running.update) / copy,
    )
    swap_in, swap_out = running.swap_in, running.swap_out
    if swap_in is not None and swap_out is not None:

        def swap() -> None:
            swap_in()
            swap_out()

        swap()
        figures["swap_peak"] = peak_of(swap) / copy
    return figures


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that are resident at the most while this runs, over what is before."""
    give_back()
    CLEAR_REFS.write_text("5")
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before)


def kilobytes(field: str) -> int:
    """What the kernel says of this process, such as VmRSS."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")


def give_back() -> None:
    """Returns freed memory to the system: what malloc holds back would hide later temporaries."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _forked(run: Callable[[], Figures]) -> Figures:
    """What ``run`` returns in a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            figures = run()
        except BaseException as error:
            traceback.print_exc()
            figures = Figures(failed=f"{type(error).__name__}: {error}")
        with os.fdopen(write, "w") as pipe:
            json.dump(figures, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return json.loads(said) if said else Figures(failed=f"its process ended with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    requests = json.loads(options.requests)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what the contenders print is no answer

    import torch
    from torch_peers import Idle, by_name

    for contender in {request[2] for request in requests}:
        by_name(contender).missing()  # which imports what is there
    # And what torch imports with its first optimizer.
    Idle([torch.nn.Parameter(torch.zeros(1))]).step()
    # Else the children's first collection would copy every page of this process's objects.
    gc.freeze()
    for name, dtype, contender in requests:
        figures = _forked(lambda: measure(name, dtype, contender, tiny=options.tiny))  # noqa: B023
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    main()
