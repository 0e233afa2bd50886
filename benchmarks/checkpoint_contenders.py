"""Who averages checkpoints, each in a process of its own; it imports nothing but what it uses.

    python benchmarks/checkpoint_contenders.py NAME OUT FILE...

Prints a line of JSON: when it had imported what it needs, the seconds after that, and what the
kernel says of its memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Average = Callable[[Sequence[str], str], object]


def ours(*, hashes: bool) -> Average:
    from swa_core import checkpoints

    return lambda files, out: checkpoints.average(files, out, hashes=hashes, force=True)


def numpy_mean() -> Average:
    """Everything in memory, then the mean."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    def run(files: Sequence[str], out: str) -> None:
        held = [load_file(file) for file in files]
        save_file({name: np.mean([each[name] for each in held], axis=0) for name in held[0]}, out)

    return run


def torch_mean() -> Average:
    """The same in torch, which has bfloat16, and maps the files."""
    import torch
    from safetensors.torch import load_file, save_file

    def run(files: Sequence[str], out: str) -> None:
        held = [load_file(file) for file in files]
        save_file(
            {name: torch.stack([each[name] for each in held]).mean(0) for name in held[0]}, out
        )

    return run


def running_sum() -> Average:
    """As fairseq's script does: one checkpoint after the other is added, in its own dtype."""
    from safetensors.torch import load_file, save_file

    def run(files: Sequence[str], out: str) -> None:
        total = {name: tensor.clone() for name, tensor in load_file(files[0]).items()}
        for file in files[1:]:
            for name, tensor in load_file(file).items():
                total[name] += tensor
        save_file({name: tensor.div_(len(files)) for name, tensor in total.items()}, out)

    return run


def mergekit() -> Average:
    """``mergekit-pytorch`` with its method "linear"; the result is ``OUT/model.safetensors``."""
    import yaml
    from mergekit.scripts.merge_raw_pytorch import main as merge

    def run(files: Sequence[str], out: str) -> None:
        models = [{"model": file, "parameters": {"weight": 1.0}} for file in files]
        Path(out).mkdir(exist_ok=True)
        config = Path(out, "config.yaml")
        config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
        merge([str(config), out, "--quiet"], standalone_mode=False)

    return run


CONTENDERS: dict[str, Callable[[], Average]] = {
    "swa average --no-hash": lambda: ours(hashes=False),
    "swa average": lambda: ours(hashes=True),
    "load all, numpy mean": numpy_mean,
    "load all, torch mean": torch_mean,
    "running sum (fairseq's way)": running_sum,
    "mergekit, linear": mergekit,
}


def main() -> None:
    name, out, *files = sys.argv[1:]
    run = CONTENDERS[name]()
    figures = {"imported": time.time(), "before": _kilobytes("VmRSS")}
    begin = time.perf_counter()
    run(files, out)
    figures["seconds"] = time.perf_counter() - begin
    figures["peak"] = _kilobytes("VmHWM")
    print("\n" + json.dumps(figures))


def _kilobytes(field: str) -> int | None:
    """What the kernel says of this process; anonymous and mapped memory together."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
