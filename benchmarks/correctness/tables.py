"""The answers as text for a terminal, and as Markdown for the documentation."""

from __future__ import annotations

import textwrap
from typing import Any

from correctness.cells import Cell

WIDTH = 17  # of a column in a terminal
WRONG = "! "


def for_terminal(results: dict[str, Any]) -> str:
    """A table for each part, a peer a row; what is not right begins with an exclamation mark."""
    out = []
    for part in results["parts"]:
        titles = [question["title"] for question in part["questions"]]
        lines = [["", *titles]]
        for row in results["rows"]:
            lines.append([row["peer"], *(_marked(Cell(**row["cells"][title])) for title in titles)])
        out += ["", part["title"], *_grid(lines)]
    if results["absent"]:
        out += ["", *(f"{family}: {why}" for family, why in results["absent"].items())]
    return "\n".join(out)


def _marked(cell: Cell) -> str:
    return f"{WRONG}{cell.text}" if cell.right is False else cell.text


def _grid(lines: list[list[str]]) -> list[str]:
    """Columns side by side, their words wrapped."""
    widths = [
        min(max(len(line[column]) for line in lines), 24 if column == 0 else WIDTH)
        for column in range(len(lines[0]))
    ]
    out = []
    for number, line in enumerate(lines):
        cells = [
            textwrap.wrap(text, width) or [""] for text, width in zip(line, widths, strict=True)
        ]
        for k in range(max(map(len, cells))):
            words = [cell[k] if k < len(cell) else "" for cell in cells]
            padded = (word.ljust(width) for word, width in zip(words, widths, strict=True))
            out.append("  ".join(padded).rstrip())
        if number == 0:
            out.append("  ".join("-" * width for width in widths))
    return out


def as_markdown(results: dict[str, Any]) -> str:
    """A page: what ran, a table for each part, and what each question means."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    out = [
        "# Is it right? Side by side with the others",
        "",
        f"Written by `python {results['command']}`: {results['snapshots']:,} snapshots in long "
        f"trainings, on {machine['system']}, Python {machine['python']}; {versions}.".replace(
            ",000 ", " 000 "
        ),
        "",
        "Every cell comes from running the package in a process of its own, on the same scripted "
        "trainings, as its documentation says; code compared what came out with what should "
        "(`benchmarks/correctness/`). **Bold** is what the question's own text calls not right; "
        "`-` is a question that does not apply, and why. Where a peer has an option against a "
        "trap, the option has a row.",
    ]
    for part in results["parts"]:
        titles = [question["title"] for question in part["questions"]]
        out += ["", f"## {part['title']}", ""]
        out.append(f"| | {' | '.join(titles)} |")
        out.append(f"|---|{'---|' * len(titles)}")
        for row in results["rows"]:
            cells = (_bold(Cell(**row["cells"][title])) for title in titles)
            out.append(f"| {row['peer']} | {' | '.join(cells)} |")
        out.append("")
        out += [f"- *{it['title']}*: {it['asks']}" for it in part["questions"]]
    if results["absent"]:
        out += ["", "Not here: "]
        out += [f"- {family}: {why}" for family, why in results["absent"].items()]
    return "\n".join(out) + "\n"


def _bold(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
    return f"**{text}**" if cell.right is False else text
