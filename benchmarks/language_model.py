"""Does averaging replace the decay of the learning rate? A small language model, over seeds.

A transformer learns the characters of the language reference that CPython carries, at a constant
rate with averages along the way, with linear decay to zero, and otherwise, all at equal numbers of
updates: ``python benchmarks/language_model.py``. Peak rates are swept for every arm alike.

What has been trained is kept, so an interrupted command goes on where it was, and more seeds cost
what they cost. ``--report`` writes the page again from the stored results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import machine
import torch
from experiments import language_arms, language_report, language_text
from experiments.cache import Cache
from experiments.language_plan import Plan, Run
from experiments.language_results import Results
from experiments.language_training import train
from tqdm import tqdm

HERE = Path(__file__).parent
NAME = "language_model"
PACKAGES = ["swa-core", "torch", "schedulefree", "numpy", "scipy", "matplotlib"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    # Small matrices: more threads only wait for each other, and sums keep their order.
    torch.set_num_threads(1)
    stored = options.out / f"{NAME}.json"
    if not options.report:
        results = run(options)
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results.to_dict(), allow_nan=False)
        stored.write_text(text + "\n", encoding="utf-8")
    try:
        found = json.loads(stored.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(
            f"{stored} is not there. Run the command without --report first."
        ) from None
    page = language_report.write(Results.from_dict(found), options.docs)
    print(f"results: {stored}\npage:    {page}")


def run(options: argparse.Namespace) -> Results:
    """Sweeps the rates, then trains every seed."""
    plan = Plan.load(quick=options.quick)
    text = language_text.load(tuple(plan.text["shares"]))
    work = Work(plan, text, Cache(options.cache))
    sweep = work.do(language_arms.sweep_runs(plan), "sweep of the rates")
    longest = str(plan.budgets[-1])
    losses = {(run.schedule, run.rate): result["losses"][longest] for run, result in sweep}
    chosen = language_arms.choose(plan, losses)
    for name, choice in chosen.items():
        edge = "; the edge of what was tried" if choice.at_edge else ""
        print(f"{name}: rate {choice.rate:g}, {choice.reading}{edge}")
    seeds = list(range(options.seeds))
    runs = work.do(language_arms.seed_runs(plan, chosen, seeds), "seeds")
    command = ["python", f"benchmarks/{NAME}.py", *(options.command)]
    return Results(
        plan=plan,
        seeds=seeds,
        chosen=chosen,
        sweep=sweep,
        runs=runs,
        about={
            "command": " ".join(command),
            "text": {
                "source": text.source,
                "sha256": text.sha256,
                "characters": {part: len(getattr(text, part)) for part in language_text.PARTS},
                "characters before repeats were left out": text.before,
            },
            "machine": machine.description(PACKAGES),
        },
    )


class Work:
    """Does trainings, or finds them done."""

    def __init__(self, plan: Plan, text: language_text.Text, cache: Cache) -> None:
        self.plan, self.text, self.cache = plan, text, cache
        # A training is another one in another version of what trains.
        self.versions = {name: metadata.version(name) for name in ("torch", "schedulefree")}

    def do(self, runs: Sequence[Run], title: str) -> list[tuple[Run, dict[str, Any]]]:
        """Each run with its result, under a bar that counts updates."""
        done = []
        total = sum(run.updates + self._extra(run) for run in runs)
        with tqdm(total=total, desc=title, unit="updates", file=sys.stderr) as bar:
            for run in runs:
                configuration = run.configuration(self.plan, self.text.sha256, self.versions)
                key = self.cache.key(configuration)
                result = self.cache.load(key)
                if result is None:
                    bar.set_postfix_str(f"{run.schedule} {run.rate:g}, seed {run.seed}")
                    result = train(self.plan, run, self.text, bar.update)
                    self.cache.store(key, result)
                else:
                    bar.update(run.updates + self._extra(run))
                done.append((run, result))
        return done

    def _extra(self, run: Run) -> int:
        return sum(map(self.plan.cooldown, run.budgets)) if run.cooldown else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute: all code, tiny sizes")
    parser.add_argument("--seeds", type=int, help="how many (default: 8; 2 with --quick)")
    parser.add_argument(
        "--report", action="store_true", help="write the page from stored results, train nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results)"
    )
    parser.add_argument(
        "--docs", type=Path, help="folder of the page and its plot (default: docs/evidence)"
    )
    parser.add_argument("--cache", type=Path, help="folder of the trainings (default: out/cache)")
    options = parser.parse_args(arguments)
    options.command = list(sys.argv[1:] if arguments is None else arguments)
    if options.seeds is None:
        options.seeds = 2 if options.quick else 8
    if options.seeds < 2:
        parser.error("--seeds: 2 at least, for differences have no interval otherwise")
    # What --quick comes to is for nobody to read: it goes where git does not look.
    out = HERE.parent / "out"
    options.cache = options.cache or out / "cache"
    options.docs = options.docs or (
        (options.out or out / "quick") if options.quick else HERE.parent / "docs" / "evidence"
    )
    options.out = options.out or (out / "quick" if options.quick else HERE / "results")
    return options


if __name__ == "__main__":
    main()
