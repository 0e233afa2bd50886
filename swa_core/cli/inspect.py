"""What an average or another checkpoint holds.

swa inspect average.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from typing import Any

from swa_core import safetensors_files
from swa_core.average_files import description
from swa_core.checkpoints import EVERYTHING, open_checkpoint
from swa_core.checkpoints.opening import is_known
from swa_core.cli.counting import bytes_of, plural
from swa_core.config_reading import write_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    parser.add_argument("file", help="or folder")
    parser.add_argument("--key", default=EVERYTHING, help="the part to show, such as model")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also read descriptions that are pickles (.metadata)",
    )
    parser.add_argument("--json", action="store_true", help="for programs to read")


def run(options: argparse.Namespace) -> None:
    """Prints what the file holds; of its arrays nothing is read."""
    figures = inspect(options.file, key=options.key, trust=options.trust)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print(drawn(figures))


def inspect(
    path: str | os.PathLike[str], *, key: str = EVERYTHING, trust: bool = False
) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain numbers and strings; no array is read.

    Args:
      path: of a file of safetensors, whatever its name, or of another checkpoint that
        ``open_checkpoint`` knows.
      key: the part of that which is meant.
      trust: also read descriptions that are pickles.

    Raises:
      StateError: no checkpoint, or a damaged one.
      OSError: it cannot be read.
    """
    name = os.path.basename(os.path.abspath(path))
    if is_known(path):
        with closing(open_checkpoint(path, key=key, trust=trust)) as checkpoint:
            return {
                "file": name,
                "tensors": {
                    tensor: {"dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.bytes}
                    for tensor, spec in sorted(checkpoint.tensors.items())
                },
                "bytes": sum(spec.bytes for spec in checkpoint.tensors.values()),
                "average": None,
                "metadata": {},
            }
    with open(path, "rb") as file:
        entries, metadata, _ = safetensors_files.read_header(file, name)
    tensors = {
        key: {
            "dtype": "bfloat16" if entry.is_bfloat16 else entry.dtype.name,
            "shape": list(entry.shape),
            "bytes": entry.end - entry.begin,
        }
        for key, entry in sorted(entries.items())
    }
    found: dict[str, Any] = {
        "file": name,
        "tensors": tensors,
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "average": None,
        "metadata": metadata,
    }
    if (described := description(name, metadata)) is not None:
        state, config = described.state, described.config
        n = state.n_averaged
        found["metadata"] = {key: value for key, value in metadata.items() if key != "swa"}
        found["average"] = {
            "n_updates": state.n_updates,
            "n_averaged": n,
            "n_skipped": state.n_skipped,
            "total": state.total,
            "rule": write_rule(config.rule),
            "effective_snapshots": config.rule.effective_snapshots(n),
            "config": config.to_dict(),
            "schedule": described.schedule and list(described.schedule),
            "framework": described.framework,
            "versions": described.versions,
        }
    return found


def drawn(found: dict[str, Any]) -> str:
    """The same as a person reads it."""
    tensors = found["tensors"]
    lines = [f"{found['file']}: {plural(len(tensors), 'tensor')}, {bytes_of(found['bytes'])}"]
    if (average := found["average"]) is not None:
        saved_by = f", saved by {average['framework']}" if average["framework"] else ""
        versions = ", ".join(f"{key} {value}" for key, value in average["versions"].items())
        lines += [
            f"an average of {plural(average['n_averaged'], 'snapshot')} after "
            f"{plural(average['n_updates'], 'update')}{saved_by}",
            f"  rule       {_said(average['rule'])}; worth {average['effective_snapshots']:.4g} "
            "equally weighted snapshots",
            f"  left out   {plural(average['n_skipped'], 'snapshot')} with NaN or Inf",
            f"  config     {_said(average['config'])}",
            f"  schedule   {average['schedule']}  (start, every, stop in updates)",
            f"  versions   {versions}",
        ]
    lines += [f"  {key}: {value}" for key, value in found["metadata"].items()]
    width = max((len(key) for key in tensors), default=0)
    lines += [
        f"  {key:{width}}  {tensor['dtype']:9} {tuple(tensor['shape'])}"
        for key, tensor in tensors.items()
    ]
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_said(part)}" for key, part in value.items())
    return str(value)
