"""The joined table and what goes with it, as text for a terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence

from speed.comparing import RULE, Comparison
from speed.growth import Curve
from speed.joining import Row, three
from speed.run import Run

COLUMNS = (
    "", "who", "of plain training", "of the ceiling", "of the best peer",
    "holds", "+ peak", "a skipped update", "",
)  # fmt: skip
NONE = "-"


def cells(row: Row) -> list[str]:
    """A row of the joined table."""
    peak = NONE if row.peak is None else f"{abs(row.peak):.2f}"
    return [
        row.part,
        row.who,
        NONE if row.training is None else row.training.text(),
        NONE if row.snapshot is None else row.snapshot.text(),
        "1, the best" if row.is_best else NONE if row.best is None else row.best.text(),
        NONE if row.held is None else f"{row.held:.2f}",
        peak,
        NONE if row.skipped is None else f"{three(row.skipped)} us",
        "; ".join(row.missing),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand under each other; the first row is the heading.

    >>> print(table([["a", "b"], ["long one", "x|y"]]))
    | a        | b    |
    |----------|------|
    | long one | x\\|y |
    """
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(f"{c:{w}s}" for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(escaped[0]), rule, *map(line, escaped[1:])])


def joined(run: Run) -> str:
    """The joined table."""
    return table([COLUMNS, *map(cells, run.rows)])


def growth(curves: Sequence[Curve]) -> str:
    """Exponents, and microseconds for each tensor."""
    out = [("", "who", "grows", "from", "to", "exponent", "us for each tensor")]
    out += [
        (
            curve.part,
            curve.who,
            curve.grows,
            f"{min(curve.sizes):,}".replace(",", " "),
            f"{max(curve.sizes):,}".replace(",", " "),
            NONE if curve.exponent is None else curve.exponent.text(),
            NONE if curve.per_tensor is None else curve.per_tensor.text(),
        )
        for curve in curves
    ]
    return table(out)


def comparison(found: Comparison | None) -> str:
    """What changed, as a list."""
    if found is None:
        return "No earlier run on such a machine is stored: nothing was compared."
    lines = [f"{found.compared} ratios compared with {found.against}. {RULE}", ""]
    for title, changes in (
        ("Regressions", found.regressions),
        ("Improvements", found.improvements),
        ("Changes of others (their packages, or the machine)", found.others),
    ):
        lines.append(f"{title}: {len(changes) or 'none'}")
        lines += [f"- {change.text()}" for change in changes]
    for title, keys in (("Not measured any more", found.gone), ("New", found.added)):
        if keys:
            lines.append(f"{title}: {len(keys)}")
            lines += [f"- {key}" for key in keys[:10]]
            lines += [f"- and {len(keys) - 10} more"] if len(keys) > 10 else []
    return "\n".join(lines)


def conditions(run: Run) -> str:
    """The machine, and whether it had other work."""
    about = run.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['memory']} GB, {about['system']}, "
        f"Python {about['python']}; {versions}.",
        "",
    ]
    if run.quick:
        lines += [
            "**A quick run: it shows that everything runs, and its figures mean nothing.**",
            "",
        ]
    if run.disturbed:
        lines += ["**Measured on a loaded machine; figures are not to be trusted:**", ""]
        lines += [f"- {why}" for why in run.disturbed]
    else:
        lines.append("Nothing else ran on the machine meanwhile.")
    return "\n".join(lines)


def parts(run: Run) -> str:
    """What was run, how long it took, and what failed."""
    out = [
        ("part", "seconds", "of CPU", "load before", "after", "cores busy with others", "command")
    ]
    for part in run.parts:
        name = f"growth, {part['part']}" if part["growth"] else part["part"]
        words = " ".join(part["command"])
        if "seconds" not in part:
            out.append((name, NONE, NONE, NONE, NONE, NONE, part["failed"]))
            continue
        figures = [
            NONE if part[key] is None else f"{part[key]:.2f}"
            for key in ("load_before", "load_after", "others")
        ]
        failed = f"FAILED: {part['failed']}; " if "failed" in part else ""
        out.append(
            (name, f"{part['seconds']:.0f}", f"{part['cpu']:.0f}", *figures, f"{failed}`{words}`")
        )
    return table(out)
