"""What averaging costs, side by side: every overhead benchmark, one table, and its history.

    python benchmarks/speed.py [--quick] [--only torch,keras-jax] [--rounds 10] [--growth]

Each benchmark runs in a process of its own; what has been measured in the folder of the run is not
measured again as long as its code, its options and the packages are the same, so that a run that
was stopped goes on. The result is stored by date and machine, compared with the last one of such a
machine, ratio by ratio, and written as a page with a plot.

Let nothing else run on the machine meanwhile: what others take is measured, and marks the run.
Growth takes up to 20 GB of memory, --checkpoints 10 GB of disk and of page cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import machine
from speed import page, plots, text
from speed.comparing import Comparison, compare
from speed.parts import CHECKPOINTS, FRAMEWORKS, GROWING, QUICK, parts
from speed.run import Run, from_json, is_the_same, store, stored
from speed.running import disturbed, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "evidence" / "speed.md"


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The options, with what follows from them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", help=f"of {', '.join(FRAMEWORKS)}, {CHECKPOINTS} (default: all but the last)")
    add("--checkpoints", action="store_true", help="checkpoints on disk, too")
    add("--growth", action="store_true", help="1 M to 500 M weights, and 10 to 10 000 tensors, too")
    add("--rounds", type=int, default=10, help="that count (default: 10)")
    add("--quick", action="store_true", help="next to nothing: whether all runs, no figures")
    add("--run", type=Path, metavar="FOLDER", help="of the run (default: out/speed/ and the date)")
    add("--results", type=Path, metavar="FOLDER", help=f"stored runs (default: {_shown(RESULTS)})")
    add("--page", type=Path, metavar="FILE", help=f"the page (default: {_shown(PAGE)})")
    add("--against", type=Path, metavar="FILE", help="a stored run (default: the last such one)")
    add("--fail-on-regression", action="store_true", help="exit with 1 if there is one")
    options = parser.parse_args(arguments)
    known = (*FRAMEWORKS, CHECKPOINTS)
    default = QUICK if options.quick else FRAMEWORKS
    options.names = options.only.split(",") if options.only else list(default)
    if unknown := set(options.names) - set(known):
        parser.error(f"--only: unknown {sorted(unknown)}; known are {', '.join(known)}")
    if options.checkpoints and CHECKPOINTS not in options.names:
        options.names.append(CHECKPOINTS)
    if options.rounds < 3:
        parser.error("--rounds: quartiles need three rounds at least")
    growing = options.names if options.only else GROWING
    options.growing = [name for name in growing if name != CHECKPOINTS] if options.growth else []
    # What is tiny, or not all, goes beside the parts and not into the repository.
    whole = not options.quick and not options.only
    name = f"{date.today()}-quick" if options.quick else str(date.today())
    options.run = options.run or ROOT / "out" / "speed" / name
    options.results = options.results or (RESULTS if whole else options.run / "results")
    options.page = options.page or (PAGE if whole else options.run / "speed.md")
    return options


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT)


def measured(options: argparse.Namespace) -> Run:
    """Runs all parts."""
    about = machine.description([])
    about = {key: about[key] for key in ("cpu", "cores", "memory", "system", "python", "versions")}
    result = Run(str(date.today()), said(options), options.quick, about)
    todo = parts(options.names, options.growing, quick=options.quick)
    records = []
    for number, part in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {part.title} ... ", end="", flush=True)
        begin = time.monotonic()
        record = run(part, options.run, options.rounds, quick=options.quick)
        records.append(record)
        result.add(record)
        if record["resumed"]:
            print("measured before")
        else:
            print(record.get("failed", f"{time.monotonic() - begin:.0f} s"))
    result.disturbed = disturbed(records)
    return result


def said(options: argparse.Namespace) -> list[str]:
    """The command that measures the same, without folders of this machine."""
    out = ["speed.py"]
    out += ["--only", options.only] if options.only else []
    out += [] if options.quick else ["--rounds", str(options.rounds)]
    flags = ("checkpoints", "growth", "quick")
    return [*out, *(f"--{flag}" for flag in flags if getattr(options, flag))]


def compared(result: Run, options: argparse.Namespace) -> Comparison | None:
    """The run beside the one that was asked for, or the last stored one of such a machine."""
    if options.against is not None:
        paths = [options.against]
    else:
        paths = stored(options.results, result.about, quick=result.quick)
    for path in paths:
        old = from_json(path.read_text(encoding="utf-8"))
        if options.against is not None or not is_the_same(result, old):
            break
    else:
        return None
    if old.quick != result.quick:
        raise SystemExit(f"{path} is {'' if old.quick else 'no '}quick run: compare like with like")
    names = [part["part"] for part in result.parts if "failed" not in part]
    memory = (old.memory(), result.memory())
    return compare(path.name, old.entries, result.entries, memory, names)


def main() -> None:
    options = options_of(sys.argv[1:])
    print(f"The parts go to {options.run}\n")
    result = measured(options)
    against = compared(result, options)
    print(f"\n{text.conditions(result)}\n\n{text.joined(result)}\n")
    if options.growth:
        print(text.growth(result.curves), *result.left_out, "", sep="\n")
    print(text.comparison(against), "\n")
    plot = plots.growth(result.curves, options.page.with_name("speed-growth.png"))
    page.write(result, options.page, against, plot)
    print(f"Stored: {store(result, options.results)}\nThe page: {options.page}")
    failed = [part for part in result.parts if "seconds" in part and "failed" in part]
    if failed:
        raise SystemExit(f"{len(failed)} parts failed; what was measured is in {options.run}")
    if options.fail_on_regression and against is not None and against.regressions:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
