"""A run as it is stored: every ratio, the joined table, growth, and what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine

from speed.fits import Fit
from speed.growth import Curve, curves, left_out
from speed.joining import Entry, Ratio, Row, entries, join


@dataclass
class Run:
    """All that is known of a run.

    Attributes:
      date: the day it ended, as in "2026-11-24".
      command: what made it.
      quick: whether it is tiny and its figures mean nothing.
      about: the machine and the versions.
      parts: each with "part", "growth", "command", "seconds", "cpu", "load_before", "load_after",
        "others" and, if it gave nothing, "failed"; see ``running.run``.
      disturbed: what else the machine did; nothing if it was quiet.
      entries: every ratio.
      rows: the joined table.
      curves: growth.
      left_out: what growth has no points of, and why.
    """

    date: str
    command: list[str]
    quick: bool
    about: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in what a part gave; see ``running.run``."""
        kept = ("part", "growth", "command", "seconds", "cpu")
        kept += ("load_before", "load_after", "others")
        self.parts.append({key: record[key] for key in (*kept, "failed") if key in record})
        if "failed" in record:
            if record["growth"]:
                self.left_out.append(f"{record['part']}: {record['failed']}")
            else:
                self.rows.append(Row(record["part"], "(nobody)", missing=[record["failed"]]))
            return
        name, found = record["part"], record["found"]
        self.about["versions"] |= found["machine"]["versions"]
        if record["growth"]:
            self.curves += curves(name, found["tables"])
            self.entries += entries(name, [t for axis in found["tables"] for t in axis["tables"]])
            self.left_out += left_out(name, found["tables"])
        else:
            self.entries += entries(name, found["tables"])
            self.rows += join(name, found["tables"])

    def memory(self) -> dict[str, float]:
        """Copies of the weights, by "part | who | what"."""
        return {
            f"{row.part} | {row.who} | {what}": value
            for row in self.rows
            for what, value in (("held", row.held), ("peak", row.peak))
            if value is not None
        }


def to_json(run: Run) -> str:
    """A run as text; each ratio on a line of its own, so that changes can be read."""
    plain = asdict(run)
    lists = ("parts", "entries", "rows", "curves")
    # Named tuples are lists of plain values: what they mean stands in the first line.
    plain["entries"] = [[*entry[:5], *entry.ratio] for entry in run.entries]
    rest = {key: value for key, value in plain.items() if key not in lists}
    lines = [f' "{key}": {json.dumps(value)}' for key, value in rest.items()]
    lines.append(' "entries are": "part, kind, of, who, ratio to, lower quartile, median, upper"')
    for key in lists:
        inner = ",\n".join(f"  {json.dumps(value)}" for value in plain[key])
        lines.append(f' "{key}": [\n{inner}\n ]' if inner else f' "{key}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> Run:
    """The run that was written."""
    plain = json.loads(text)
    plain.pop("entries are")
    plain["entries"] = [
        Entry(*five, Ratio(*three)) for *five, a, b, c in plain["entries"] for three in [(a, b, c)]
    ]
    for row in plain["rows"]:
        for key in ("training", "snapshot", "best"):
            row[key] = None if row[key] is None else Ratio(*row[key])
    for curve in plain["curves"]:
        curve["seconds"] = [tuple(three) for three in curve["seconds"]]
        for key in ("exponent", "per_tensor"):
            curve[key] = None if curve[key] is None else Fit(*curve[key])
    plain["rows"] = [Row(**row) for row in plain["rows"]]
    plain["curves"] = [Curve(**curve) for curve in plain["curves"]]
    return Run(**plain)


def stored(folder: Path, about: Mapping[str, Any], *, quick: bool) -> Iterator[Path]:
    """The runs in a folder on such a machine, the last one first."""

    def age(path: Path) -> tuple[str, int]:
        date, number = path.stem[:10], path.stem.rpartition(".")[2]
        return date, int(number) if number.isdigit() else 1

    for path in sorted(folder.glob("*.json"), key=age, reverse=True):
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain.get("quick") == quick and machine.is_same(plain["about"], about):
            yield path


def store(run: Run, folder: Path) -> Path:
    """Writes a run as ``<date>-<machine>.json``; the second one of a day ends in ``.2``.

    A run of the same measurements, which were resumed, is written again and is no second one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.date}-{machine.short_name(run.about)}"
    path, number = folder / f"{name}.json", 1
    while path.exists() and not is_the_same(run, from_json(path.read_text(encoding="utf-8"))):
        number += 1
        path = folder / f"{name}.{number}.json"
    path.write_text(to_json(run), encoding="utf-8")
    return path


def is_the_same(run: Run, other: Run) -> bool:
    """Whether all that one of them measured is what the other did: one went on where it stopped."""
    mine, theirs = set(run.entries), set(other.entries)
    return bool(theirs) and (mine <= theirs or theirs <= mine)
