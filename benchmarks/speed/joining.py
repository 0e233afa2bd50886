"""Tables of the benchmarks, joined: ratios to the base and to the best peer, and a row for each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from timing import quartiles

from speed.names import SKIPPING, canonical, how_often, is_ours, is_peer

Figures = Mapping[str, Any]  # of a table, as ``timing.Table.figures`` gives them


class Ratio(NamedTuple):
    """Quartiles of the rounds' ratios, and to what."""

    low: float
    median: float
    high: float

    def text(self) -> str:
        """As it is printed.

        >>> Ratio(1.0, 1.234, 20.0).text()
        '1.23 (1.00-20.0)'
        """
        return f"{three(self.median)} ({three(self.low)}-{three(self.high)})"


def three(value: float) -> str:
    """Three digits, and no exponent.

    >>> three(0.123), three(12.34), three(412.3)
    ('0.12', '12.3', '412')
    """
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


class Entry(NamedTuple):
    """One ratio of one row of one table: what is compared from run to run.

    Attributes:
      part: the benchmark it is of, such as "torch" or "keras-jax".
      kind: of the table: "snapshot", "training", "swap", "skipped" and others.
      of: of what: a set and a dtype, or an optimizer and a number of weights.
      who: the row.
      to: what the ratio is to: the name of the base, or "the best peer".
      ratio: quartiles and median.
    """

    part: str
    kind: str
    of: str
    who: str
    to: str
    ratio: Ratio

    @property
    def key(self) -> str:
        """By which it is found in another run."""
        return " | ".join((self.part, self.kind, self.of, self.who, self.to))


BEST = "the best peer"
CEILINGS = ("C loop", "cat of the same files")


def best_peer(table: Figures, like: str) -> str | None:
    """The fastest of the others who averages as often, and in float32; None if there is none.

    Args:
      table: its figures.
      like: the row that is compared with it, which is not asked to be ours.
    """
    often = how_often(like)
    peers = {
        name: statistics.median(row["rounds"])
        for name, row in table["rows"].items()
        if is_peer(name)
        and how_often(name) == often
        # A narrower average is a wrong one: it is no competitor.
        and row.get("average", "float32") == "float32"
    }
    return min(peers, key=peers.__getitem__) if peers else None


def ratio(table: Figures, name: str, base: str) -> Ratio:
    """How many times as long as another row's a row's rounds took."""
    rows = table["rows"]
    return Ratio(*quartiles(rows[name]["rounds"], rows[base]["rounds"]))


def entries(part: str, tables: Iterable[Figures]) -> list[Entry]:
    """Every ratio of the tables of a part."""
    out = []
    for table in tables:
        for name in table["rows"]:
            about = (part, table["kind"], table["of"], name)
            if name != table["base"]:
                out.append(Entry(*about, table["base"], ratio(table, name, table["base"])))
            peer = best_peer(table, name)
            averages = is_ours(name) or is_peer(name)
            if averages and peer is not None and peer != name:
                out.append(Entry(*about, BEST, ratio(table, name, peer)))
    return out


@dataclass(frozen=True)
class Reference:
    """Which tables of a part the joined one is made of.

    Attributes:
      training: what the table of train steps is of; a beginning of it is enough.
      snapshot: the same of a snapshot alone.
      skipped: the same of updates that are no snapshot.
      held, peak: the columns of memory, and in which kind of table they are.
      copy: what the memory is divided by for copies of the weights; the name of a key of the table.
    """

    training: str = ""
    snapshot: str = ""
    skipped: str = ""
    held: str = "holds"
    peak: str = "+ peak"
    memory: str = "snapshot"
    copy: str | None = None


REFERENCES = {
    "torch": Reference("Adam", "resnet50, float32"),
    **{
        f"keras-{backend}": Reference("Adam", "transformer, float32")
        for backend in ("tensorflow", "jax", "torch")
    },
    "optax": Reference("Adam", "200 tensors", "200 tensors", peak="+ temp", memory="training"),
    "checkpoints": Reference(
        snapshot="float32", held="", peak="beyond", memory="checkpoints", copy="MB"
    ),
}


@dataclass
class Row:
    """A row of the joined table. What is None was not measured; ``missing`` says why, if known.

    Attributes:
      part, who: the benchmark and the contender.
      training: ratio to plain training, averaging at every update.
      snapshot: ratio to the ceiling of a snapshot alone (of files: of the whole, to ``cat``).
      best: ratio of the same to the best peer; None for that peer itself.
      is_best: whether it is the best peer.
      held, peak: copies of the weights in float32, always and besides while an update runs.
      skipped: what an update costs that takes no snapshot [us].
      missing: reasons.
    """

    part: str
    who: str
    training: Ratio | None = None
    snapshot: Ratio | None = None
    best: Ratio | None = None
    is_best: bool = False
    held: float | None = None
    peak: float | None = None
    skipped: float | None = None
    missing: list[str] = field(default_factory=list)


def find(tables: Iterable[Figures], kind: str, of: str) -> Figures | None:
    """The table of a kind that is of this: the last one, if it was measured more than once."""
    found = [t for t in tables if t["kind"] == kind and t["of"].startswith(of)]
    # Tiny runs have one table in the place of many.
    if not found:
        found = [t for t in tables if t["kind"] == kind][:1]
    return found[-1] if found else None


def join(part: str, tables: list[Figures]) -> list[Row]:
    """The rows of a part: everybody who averages, ours first."""
    reference = REFERENCES[part]
    rows: dict[str, Row] = {}

    def row(name: str) -> Row:
        who = canonical(name)
        return rows.setdefault(who, Row(part, who))

    alone = find(tables, "checkpoints" if part == "checkpoints" else "snapshot", reference.snapshot)
    if alone is not None:
        for name in _averaging(alone):
            it = row(name)
            if alone["base"] in CEILINGS:
                it.snapshot = ratio(alone, name, alone["base"])
            peer = best_peer(alone, name)
            it.is_best = peer == name
            if peer is not None and not it.is_best:
                it.best = ratio(alone, name, peer)
        for name, why in alone["absent"].items():
            row(name).missing.append(why)
    training = find(tables, "training", reference.training)
    if training is not None:
        for name in _averaging(training):
            it = row(name)
            it.training = ratio(training, name, training["base"])
    memory = find(
        tables,
        reference.memory,
        reference.training if reference.memory == "training" else reference.snapshot,
    )
    if memory is not None:
        copy = memory[reference.copy] if reference.copy else 1.0
        for name, figures in memory["rows"].items():
            if how_often(name) == "always" and canonical(name) in rows:
                it = row(name)
                it.held, it.peak = figures.get(reference.held), figures.get(reference.peak)
                it.peak = None if it.peak is None else it.peak / copy
        for name, why in memory.get("unmeasured", {}).items():
            row(name).missing.append(why)
    skipped = find(tables, "skipped", reference.skipped)
    if skipped is not None:
        for name, figures in skipped["rows"].items():
            for who in SKIPPING.get(name, (name,) if is_peer(name) else ()):
                row(who).skipped = figures["us more"]
    return sorted(rows.values(), key=lambda each: not is_ours(each.who))


def _averaging(table: Figures) -> list[str]:
    """Rows that average at every update."""
    return [
        name
        for name in table["rows"]
        if how_often(name) == "always" and (is_ours(name) or is_peer(name))
    ]
