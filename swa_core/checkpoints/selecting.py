"""Which checkpoints, and with which weights."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from swa_core import safetensors_files
from swa_core.average_files import description
from swa_core.errors import StateError
from swa_core.rules import Rule, Uniform


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names as numbers.

    >>> sorted(["step-100", "step-20", "step-3"], key=natural)
    ['step-3', 'step-20', 'step-100']
    """
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def expanded(patterns: Iterable[str]) -> list[Path]:
    """The paths that patterns match, those of one pattern in natural order; each once.

    Raises:
      FileNotFoundError: a pattern matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise FileNotFoundError(f"no checkpoint matches {pattern}")
        found.update(dict.fromkeys(map(Path, sorted(matches, key=natural))))
    return [*found]


def best(
    paths: Sequence[Path],
    number: int,
    metrics: str | os.PathLike[str],
    *,
    by: str,
    mode: Literal["min", "max"],
) -> list[Path]:
    """The best of the checkpoints by a metric, in their own order.

    Args:
      paths: of the checkpoints.
      number: how many to take [>= 1].
      metrics: a JSON file, an object of metrics by checkpoint or a list of objects with
        "checkpoint", or a CSV file with a column "checkpoint". Checkpoints are named by path or by
        the last part of it.
      by: the metric.
      mode: whether less or more of it is better.

    Raises:
      StateError: the file is none of these, or tells nothing about a checkpoint.
    """
    table = _metrics(Path(metrics), by)
    values = {}
    for path in paths:
        value = table.get(str(path), table.get(path.name))
        if value is None:
            raise StateError(
                f"{Path(metrics).name} has no {by!r} of {path.name}.",
                hint=f"it has it of {', '.join(sorted(table)[:8]) or 'no checkpoint'}.",
            )
        values[path] = value if mode == "min" else -value
    if number > len(paths):
        raise StateError(
            f"the best {number} of {len(paths)} checkpoints were asked for.",
            hint="name more checkpoints, or ask for fewer.",
        )
    chosen = set(sorted(paths, key=values.__getitem__)[:number])
    return [path for path in paths if path in chosen]


def _metrics(file: Path, by: str) -> dict[str, float]:
    try:
        text = file.read_text(encoding="utf-8")
        rows = _csv_rows(text) if file.suffix == ".csv" else _json_rows(json.loads(text))
        found = {name: float(row[by]) for name, row in rows if row.get(by) not in (None, "")}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StateError(
            f"{file.name} holds no metrics by checkpoint ({error!r}).",
            hint='JSON: {"epoch-3": {"loss": 0.1}}, or CSV with columns checkpoint and loss.',
        ) from error
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise StateError(
            f"{file.name}: the {by!r} of {bad[0]} is {found[bad[0]]}.",
            hint="leave that checkpoint out.",
        )
    return found


def _csv_rows(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(row["checkpoint"], row) for row in csv.DictReader(text.splitlines())]


def _json_rows(document: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(document, list):
        return [(row["checkpoint"], row) for row in document]
    return [*document.items()]


def window_weights(paths: Sequence[Path]) -> list[float]:
    """What two files of one running average weigh in the mean of the snapshots between them.

    ``(avg_e n_e - avg_s n_s) / (n_e - n_s)`` of the later one e and the earlier one s.

    Args:
      paths: of the later file and of the earlier one.

    Raises:
      StateError: they are no two files of uniform running averages with snapshots between them.
    """
    if len(paths) != 2:
        raise StateError(
            f"a window lies between two files, and {len(paths)} were given.",
            hint="pass the later one first.",
        )
    counts = []
    for path in paths:
        with open(path, "rb") as file:
            _, metadata, _ = safetensors_files.read_header(file, path.name)
        found = description(path.name, metadata)
        if found is None or found.config.rule != Uniform():
            raise StateError(
                f"{path.name} is no uniform running average.",
                hint="only of those does the difference of two tell what lies between them.",
            )
        counts.append(found.state.n_averaged)
    if counts[0] <= counts[1] or not counts[1]:
        raise StateError(
            f"{paths[0].name} holds {counts[0]} snapshots and {paths[1].name} {counts[1]}, so "
            "none lies between them.",
            hint="pass the later one first.",
        )
    return [float(counts[0]), -float(counts[1])]


def weights_of(rule: Rule, n: int) -> list[float]:
    """What each of n checkpoints, the oldest first, weighs in the average of a rule.

    Relative to the newest; from the recurrence of ``total`` in ``swa_core.rules``.

    >>> from swa_core.rules import EMA, Uniform
    >>> weights_of(Uniform(), 3), weights_of(EMA(0.5), 3)
    ([1.0, 1.0, 1.0], [0.25, 0.5, 1.0])
    """
    weights = [1.0]
    for k in range(n - 1, 0, -1):
        weights.append(weights[-1] * float(rule.retain(float(k))))
    return weights[::-1]
