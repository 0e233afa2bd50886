"""Averages checkpoints that are already on disk.

    swa average 'runs/epoch-*.safetensors' --last 10 -o average.safetensors

Checkpoints are taken in the order given, those of a pattern by the numbers in their names. The
result has dtypes, layout and metadata of the first one, or is one file of safetensors if its name
ends so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from swa_core import checkpoints, config_reading
from swa_core.cli.counting import bytes_of, plural, positive, size
from swa_core.errors import SWAError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="files, folders or patterns")
    add("-o", "--out", required=True, help="the result")
    add("--last", type=positive, metavar="N", help="of these the last ones only")
    add("--best", type=positive, metavar="N", help="of these the best ones by a metric")
    add("--by", metavar="FILE", help="a JSON or CSV file of metrics by checkpoint, for --best")
    add("--metric", help="which of them")
    add("--mode", choices=("min", "max"), help="whether less or more of it is better")
    add("--rule", type=_rule, help='"uniform" (default), "ema(0.9)", "polynomial(3)"')
    add(
        "--window",
        action="store_true",
        help="of two files of one uniform running average, the later one first: the mean of the "
        "snapshots between them",
    )
    add("--weights", type=_numbers, help="one for each checkpoint: 1,2,3")
    add("--key", help="the part to average of checkpoints that hold more, such as model; * for all")
    add("--trust", action="store_true", help="also read descriptions that are pickles (.metadata)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="to sum in")
    add("--integers", choices=("equal", "last", "first"), default="equal")
    add("--allow-missing", action="store_true", help="average tensors over those who have them")
    add("--force", action="store_true", help="replace the result if it is there")
    add(
        "--no-hash",
        action="store_true",
        help="no SHA-256 of the checkpoints in the provenance; several times as fast",
    )
    add("--memory", type=size, metavar="SIZE", help="refuse to take more than that: 500MB")
    add("--dry-run", action="store_true", help="check and list everything, write nothing")
    add("--quiet", action="store_true", help="no bar, no summary")
    add("--json", action="store_true", help="the summary for programs to read")


def run(options: argparse.Namespace) -> None:
    """Averages, and says what was done."""
    paths = checkpoints.expanded(options.checkpoints)
    if options.last is not None:
        paths = paths[-options.last :]
    if options.best is not None:
        if None in (options.by, options.metric, options.mode):
            raise UsageError("--best needs --by FILE, --metric NAME and --mode min or max")
        paths = checkpoints.best(
            paths, options.best, options.by, by=options.metric, mode=options.mode
        )
    weights = options.weights
    if sum(given is not None for given in (options.rule, weights, options.window or None)) > 1:
        raise UsageError("say one of --rule, --weights and --window")
    if options.rule is not None:
        weights = checkpoints.weights_of(options.rule, len(paths))
    if options.window:
        weights = checkpoints.window_weights(paths)
    bar = Bar() if sys.stderr.isatty() and not options.quiet else None
    try:
        plan = checkpoints.average(
            paths,
            options.out,
            weights=weights,
            key=options.key,
            trust=options.trust,
            # The difference of two sums needs the digits that it loses.
            dtype="float64" if options.window else options.dtype,
            integers=options.integers,
            allow_missing=options.allow_missing,
            force=options.force,
            hashes=not options.no_hash,
            memory=options.memory,
            dry_run=options.dry_run,
            progress=bar,
        )
    except SWAError:
        raise  # some are a ValueError, too
    except ValueError as error:
        raise UsageError(str(error)) from error
    finally:
        if bar is not None:
            bar.close()
    if options.json:
        print(json.dumps(_figures(plan, options), indent=2))
    elif not options.quiet:
        print(_said(plan, options))


class UsageError(ValueError):
    """Arguments that do not go together."""


class Bar:
    """One line on the terminal: how much is read, how fast, and how long it will take yet."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < 0.1 and done < total:
            return
        self._shown = now
        rate = done / max(now - self._begin, 1e-9)
        left = (total - done) / rate if rate else 0.0
        line = f"{done / total:5.0%}  {bytes_of(round(rate))}/s  {left:.0f} s left"
        print(f"\r{line:40}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line."""
        print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)


def _figures(plan: checkpoints.Plan, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "out": options.out,
        "written": not options.dry_run,
        "inputs": plan.inputs,
        "weights": plan.weights,
        "tensors": len(plan.tensors),
        "averaged": plan.averaged,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": plan.memory,
    }


def _said(plan: checkpoints.Plan, options: argparse.Namespace) -> str:
    total = sum(plan.weights)
    lines = [
        f"  {weight / total:6.2%}  {path}"
        for path, weight in zip(plan.inputs, plan.weights, strict=True)
    ]
    whole = len(plan.tensors) - plan.averaged
    beside = f", {plural(whole, 'tensor')} of whole numbers taken over" if whole else ""
    done = "would be averaged" if options.dry_run else "averaged"
    lines.append(
        f"{plural(plan.averaged, 'tensor')} {done}{beside}; "
        f"{bytes_of(plan.bytes_read)} to read, {bytes_of(plan.bytes_written)} in {options.out}, "
        f"with {bytes_of(plan.memory)} of memory at the most"
    )
    return "\n".join(lines)


def _rule(text: str) -> Any:
    name, _, rest = text.partition("(")
    number = rest.removesuffix(")")
    table: Any = name
    if rest:
        table = {"name": name, {"ema": "decay", "polynomial": "eta"}.get(name, "value"): number}
        try:
            table = {key: float(v) if key != "name" else v for key, v in table.items()}
        except ValueError:
            raise argparse.ArgumentTypeError(f"{number!r} is no number") from None
    fields, faults = config_reading.read({"rule": table}, "")
    if faults:
        raise argparse.ArgumentTypeError(" ".join(fault.message for fault in faults))
    return fields["rule"]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers such as 1,2,3") from None
