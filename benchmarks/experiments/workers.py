"""Seeds side by side: a process for each seed and framework, and their results together."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
from tqdm import tqdm

from experiments import images
from experiments.arms import arms
from experiments.cache import Cache
from experiments.seeds import Seed
from experiments.settings import Experiment

PACKAGES = ("swa-core", "numpy", "torch", "keras", "tensorflow", "jax", "jaxlib", "optax", "flax")


def work(experiment: Experiment, options: argparse.Namespace) -> None:
    """One seed in one framework; epochs and the result are said to the parent, as JSON lines."""

    def say(**event: object) -> None:
        print(json.dumps(event), flush=True)

    data = images.load(experiment, options.data, options.cache)
    seed = Seed(
        data,
        options.worker["framework"],
        options.worker["seed"],
        Cache(options.cache),
        lambda epochs: say(event="epochs", epochs=epochs),
    )
    result = seed.run()
    say(event="result", arms=result)


def gather(
    experiment: Experiment, options: argparse.Namespace, command: list[str]
) -> dict[str, Any]:
    """All seeds in all frameworks, from the cache where they are there.

    The seeds go before the frameworks, so that what an interruption leaves can be compared.
    """
    images.load(
        experiment, options.data, options.cache
    )  # whether it is there, before anything is trained
    tasks = [(seed, name) for seed in range(options.seeds) for name in options.frameworks]
    epochs = sum(arm.end - arm.begin for arm in arms(experiment))
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    pinned = options.jobs > 1 and hasattr(os, "sched_getaffinity")
    every = sorted(os.sched_getaffinity(0)) if pinned else [None]
    for job in range(options.jobs):
        cores.put(every[job % len(every)])
    with (
        tqdm(total=epochs * len(tasks), unit="epoch", smoothing=0.02) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
    ):

        def run(task: tuple[int, str]) -> dict[str, Any]:
            core = cores.get()
            try:
                return _child(command, {"seed": task[0], "framework": task[1], "core": core}, bar)
            finally:
                cores.put(core)

        found = dict(zip(tasks, pool.map(run, tasks), strict=True))
    about = machine.description(PACKAGES)
    frameworks = {
        name: {str(seed): found[seed, name]["arms"] for seed in range(options.seeds)}
        for name in options.frameworks
    }
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_shown(options)]),
        "machine": {key: about[key] for key in ("cpu", "cores", "system", "python", "versions")},
        "experiment": experiment.to_dict(),
        "seeds": list(range(options.seeds)),
        "frameworks": frameworks,
    }


def _shown(options: argparse.Namespace) -> list[str]:
    """The command, without folders of this machine."""
    out = [options.experiment.stem, "--frameworks", ",".join(options.frameworks)]
    out += ["--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    return [*out, *(["--quick"] if options.quick else ["--data", "FOLDER"])]


def _child(command: list[str], worker: dict[str, Any], bar: tqdm) -> dict[str, Any]:
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if worker["framework"] == "keras":
        env.setdefault("KERAS_BACKEND", "tensorflow")
    with subprocess.Popen(
        [*command, "--worker", json.dumps(worker)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as child:
        complaints: list[str] = []
        # Read beside the results: a full pipe would stop the child.
        reader = threading.Thread(target=lambda: complaints.extend(child.stderr))
        reader.start()
        result = None
        for line in child.stdout:
            if not line.startswith('{"event"'):
                continue  # what a framework prints
            event = json.loads(line)
            if event["event"] == "epochs":
                bar.update(event["epochs"])
            else:
                result = event
        reader.join()
    if child.returncode or result is None:
        what = f"{worker['framework']}, seed {worker['seed']}"
        raise SystemExit(f"{what} failed:\n{''.join(complaints[-30:])}")
    return result
