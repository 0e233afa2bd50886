"""Does averaging help? The paper's experiment in miniature, in every framework.

    python benchmarks/experiment.py fashion-mnist --data FOLDER
    python benchmarks/experiment.py cifar10 --data FOLDER --frameworks torch --seeds 20
    python benchmarks/experiment.py cifar10 --data FOLDER --tune
    python benchmarks/experiment.py cifar10 --report

SGD with the paper's annealing, SWA at a constant and a cyclical rate, EMA, with and without batch
norm recomputed, at 1 and 1.25 budgets, over seeds that are the same for all. What is trained is in
``benchmarks/experiments/NAME.toml``, or in a TOML file of that kind that is named instead.

Every arm of a seed is computed once and kept in the cache; an interrupted run goes on where it was.
The results go to ``--results``, tables and curves to ``--docs``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.settings import Experiment

HERE = Path(__file__).parent
FRAMEWORKS = ("torch", "keras", "jax")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="fashion-mnist, cifar10, or a TOML file of that kind")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where the data set is")
    parser.add_argument(
        "--frameworks", default=",".join(FRAMEWORKS), help="comma-separated (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=8, help="how many (default: 8)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at once, each on one core (default: 1)"
    )
    parser.add_argument("--cache", type=Path, default=Path("out/experiments"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "evidence", metavar="FOLDER"
    )
    parser.add_argument(
        "--tune", action="store_true", help="only choose rates, on held-out images, in PyTorch"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: from the results")
    parser.add_argument(
        "--quick", action="store_true", help="digits, 2 seeds: whether all runs, no figures"
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.frameworks = options.frameworks.split(",")
    if unknown := set(options.frameworks) - set(FRAMEWORKS):
        parser.error(f"--frameworks: unknown {sorted(unknown)}; known are {', '.join(FRAMEWORKS)}")
    if options.quick:
        options.seeds = 2
    if options.seeds < 2 or options.jobs < 1:
        parser.error("--seeds must be at least 2, --jobs at least 1")
    if not options.experiment.endswith(".toml"):
        options.experiment = HERE / "experiments" / f"{options.experiment}.toml"
    options.experiment = Path(options.experiment)
    return options


def tune(experiment: Experiment, options: argparse.Namespace) -> None:
    """Says which rates are best on held-out images; to take them is to write them down."""
    import machine
    from experiments import images, tuning
    from experiments.cache import Cache

    data = images.load(experiment, options.data, options.cache, held_out=True)
    found = tuning.tune(data, Cache(options.cache), lambda line: print(line, flush=True))
    path = options.results / f"tuning-{experiment.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine.description(("swa-core", "numpy", "torch"))
    made = {
        "command": f"python benchmarks/experiment.py {experiment.name} --data FOLDER --tune",
        "seeds": [tuning.SEED],
        "machine": {key: about[key] for key in ("cpu", "cores", "python", "versions")},
    }
    path.write_text(json.dumps({**made, **found}, indent=1) + "\n", encoding="utf-8")
    print(f"best: {found['best']}; they are taken if they stand in {options.experiment.name}")


def main() -> None:
    options = arguments()
    if options.worker is not None and options.worker["core"] is not None:
        # Before a framework counts the cores: seeds side by side, each with one thread.
        os.sched_setaffinity(0, {options.worker["core"]})
        os.environ |= {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    from experiments import settings

    experiment = settings.load(options.experiment)
    if options.quick:
        experiment = experiment.tiny()
    if options.worker is not None:
        from experiments.workers import work

        work(experiment, options)
        return
    from experiments import report, workers

    if options.tune:
        tune(experiment, options)
        return
    path = options.results / f"averaging-{experiment.name}.json"
    if options.report:
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        results = workers.gather(experiment, options, [sys.executable, *sys.argv])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(report.write(results, options.docs))


if __name__ == "__main__":
    main()
