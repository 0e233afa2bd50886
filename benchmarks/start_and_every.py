"""When should averaging start, and how often take a snapshot? A sweep of both, as heat maps.

    python benchmarks/start_and_every.py --dataset fashion-mnist --data FOLDER
    python benchmarks/start_and_every.py --dataset cifar10 --data FOLDER --seeds 20
    python benchmarks/start_and_every.py --report

A small network with batch norm is trained over several seeds, at constant learning rates and at
one that is annealed to zero. Averaging does not touch the training, so that every pair of start
and every is averaged along the same ones. What is trained is in ``start_and_every.toml``.

Every training is computed once and kept in the cache; an interrupted run goes on after the last.
Results go to ``benchmarks/results``, the page and its heat maps, of all data sets that there are
results of, to ``docs/evidence``; with ``--out`` all go there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATASETS = ("fashion-mnist", "cifar10", "digits")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where the data set is")
    parser.add_argument("--seeds", type=int, help="how many (default: 8, with --quick 2)")
    parser.add_argument("--rates", nargs="+", help="some of the plan's rates (default: all)")
    parser.add_argument("--cache", type=Path, default=Path("out/experiments"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results and the page")
    parser.add_argument("--report", action="store_true", help="train nothing: from the results")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, 2 seeds: whether all runs, no figures"
    )
    options = parser.parse_args()
    if options.seeds is None:
        options.seeds = 2 if options.quick else 8
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: what is reported are differences over seeds")
    if options.quick and options.out is None:
        options.out = Path("out/start_and_every-quick")
    options.results = options.out or HERE / "results"
    options.docs = options.out or HERE.parent / "docs" / "evidence"
    return options


def command(options: argparse.Namespace) -> str:
    """What made a result, without the folders of the machine that it was made on."""
    words = [f"python benchmarks/start_and_every.py --dataset {options.dataset}"]
    words += ["--data FOLDER"] if options.data else []
    words += ["--quick"] if options.quick else []
    words += [f"--seeds {options.seeds}"]
    words += [f"--rates {' '.join(options.rates)}"] if options.rates else []
    return " ".join(words)


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """The trainings, and all averages along them, as one result."""
    import torch
    from experiments.cache import Cache
    from experiments.images import loaders
    from experiments.sweep_plan import Plan
    from experiments.sweep_runs import collect, joined
    from experiments.sweep_training import split
    from machine import description

    # The figures depend on the order of sums; one thread has one order.
    torch.set_num_threads(1)
    plan = Plan.load(quick=options.quick).of_rates(options.rates)
    data = split(loaders.load(options.dataset, options.data), plan.training)
    seeds = list(range(options.seeds))
    runs = collect(plan, options.dataset, data, seeds, Cache(options.cache))
    return {
        "command": command(options),
        "dataset": options.dataset,
        "seeds": seeds,
        "machine": description(["torch", "numpy"]),
        "plan": asdict(plan),
        **joined(plan, data, runs),
    }


def main() -> None:
    options = arguments()
    from experiments.sweep_report import write

    if not options.report:
        result = sweep(options)
        path = options.results / f"start_and_every-{options.dataset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(write(options.results, options.docs).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
