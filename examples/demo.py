"""The main job: one network, one swa.toml, every framework that is installed.

Trains on scikit-learn's digits (or Fashion-MNIST, CIFAR-10 from a folder) over several seeds, and
ends with a table and a plot. Each framework runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
KERAS_BACKENDS = ("tensorflow", "jax", "torch")

# What a run is called, the module that has it, and the packages it needs.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("train_torch", ("torch",)),
    "jax": ("train_jax", ("jax", "optax", "flax")),
    **{f"keras-{name}": ("train_keras", ("keras", name)) for name in KERAS_BACKENDS},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "frameworks",
        nargs="*",
        metavar="FRAMEWORK",
        help=f"{', '.join(RUNS)} (default: torch, jax, and keras on its default backend)",
    )
    parser.add_argument("--config", type=Path, default=HERE / "swa.toml", help="the [swa] table")
    parser.add_argument(
        "--dataset", choices=("digits", "fashion-mnist", "cifar10"), default="digits"
    )
    parser.add_argument("--data", type=Path, help="the folder of fashion-mnist or cifar10")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.1, help="the rate until [swa.lr] sets in")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the plot goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("epochs", "batch_size", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if unknown := [name for name in options.frameworks if name not in (*RUNS, "keras")]:
        parser.error(f"unknown framework {unknown[0]!r}; known are {', '.join(RUNS)}")
    if default_keras() not in RUNS:
        parser.error(f"KERAS_BACKEND is none of {', '.join(KERAS_BACKENDS)}")
    return options


def default_keras() -> str:
    return f"keras-{os.environ.get('KERAS_BACKEND', 'tensorflow')}"


def chosen(asked: list[str]) -> list[str]:
    """The runs to make: those asked for, or all whose packages are installed."""
    names = [default_keras() if name == "keras" else name for name in asked]
    found = []
    for name in names or ["torch", default_keras(), "jax"]:
        missing = [need for need in RUNS[name][1] if importlib.util.find_spec(need) is None]
        if missing and asked:
            raise SystemExit(f"{name} needs {', '.join(missing)}: pip install 'swa-core[all]'.")
        if missing:
            print(f"{name} is left out: {', '.join(missing)} is not installed.")
        else:
            found.append(name)
    if not found:
        raise SystemExit("no framework is installed: pip install 'swa-core[all]'.")
    return found


def work(options: argparse.Namespace) -> None:
    """One framework's runs, reported to the parent as lines of JSON."""
    from data import load

    from swa_core import SWAConfig

    def say(**event: object) -> None:
        print(json.dumps(event), flush=True)

    program = importlib.import_module(RUNS[options.worker][0])
    data, config = load(options.dataset, options.data), SWAConfig.load(options.config)
    sizes = {"epochs": options.epochs, "batch_size": options.batch_size, "rate": options.rate}
    for seed in range(options.seeds):
        common = {**sizes, "seed": seed, "progress": lambda: say(event="epoch")}
        record = program.train(data, config, curves=seed == 0, **common)
        record.scores |= program.train_annealed(data, **common).scores
        say(event="record", record=asdict(record))


def gather(name: str, options: argparse.Namespace, progress: Callable[[], object]) -> list[dict]:
    """The records of one framework's process."""
    command = [sys.executable, __file__, "--worker", name]
    for option in ("config", "dataset", "data", "epochs", "batch_size", "rate", "seeds"):
        if (value := getattr(options, option)) is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if name.startswith("keras-"):
        env["KERAS_BACKEND"] = name.removeprefix("keras-")
    records, complaints = [], []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as child:
        # Read beside the records: a full pipe would stop the child.
        reader = threading.Thread(target=lambda: complaints.extend(child.stderr))
        reader.start()
        for line in child.stdout:
            if not line.startswith('{"event"'):
                continue  # what a framework prints
            event = json.loads(line)
            if event["event"] == "epoch":
                progress()
            else:
                records.append(event["record"])
        reader.join()
    if child.returncode:
        raise SystemExit(f"{name} failed:\n{''.join(complaints[-30:])}")
    return records


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
        return
    from data import load
    from report import plot, table
    from tqdm import tqdm

    from swa_core import ConfigError, SWAConfig

    names = chosen(options.frameworks)
    try:  # the configuration and the data are looked at before anything is trained
        config = SWAConfig.load(options.config)
    except (ConfigError, OSError) as error:
        raise SystemExit(str(error)) from error
    load(options.dataset, options.data)
    print(f"{options.dataset}, {options.epochs} epochs, {options.seeds} seeds: {config.to_dict()}")
    runs = {}
    total = 2 * options.epochs * options.seeds  # with averaging, and annealed
    for name in names:
        with tqdm(total=total, desc=f"{name:17s}", unit="epoch") as bar:
            runs[name] = gather(name, options, bar.update)
    print(table(runs))
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / f"demo-{options.dataset}.png"
    plot(runs, picture)
    print(f"\nThe loss over the training and along the line to the average: {picture}")


if __name__ == "__main__":
    main()
