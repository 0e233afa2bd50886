"""The loss around the average and around annealed SGD: the curves of the paper's figures.

    python benchmarks/landscape.py cifar10 --data FOLDER
    python benchmarks/landscape.py cifar10 --report

For some seeds of an experiment, in PyTorch, by ``swa_torch.plots``: training loss and test error on
the line from SGD to SWA, along random directions from both (how flat it is there), and, of the
first seed, over the plane through the first snapshot, the last one and their average. Batch norm is
recomputed at each place.

What is written: the data to ``--results``, pictures and a page to ``--docs``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from experiments import images, settings
from experiments.arms import arms
from experiments.cache import Cache
from experiments.scores import score
from experiments.solutions import solutions
from experiments.statistics import paired
from tqdm import tqdm

from swa_core import plots
from swa_torch.plots import loss_line, loss_plane, loss_rays

HERE = Path(__file__).parent
LOSS, ERROR = "training loss", "test error [%]"
# A rise of the training loss that the radius is told of [nats].
RISE = 0.1
DIRECTIONS, RADII, WIDTH = 10, 9, 15


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="a name in benchmarks/experiments")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where the data set is")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument(
        "--images", type=int, default=2000, help="measured on so many of each set (default: 2000)"
    )
    parser.add_argument("--cache", type=Path, default=Path("out/experiments"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "evidence", metavar="FOLDER"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: from the results")
    parser.add_argument("--quick", action="store_true", help="digits: whether all runs, no figures")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2")
    return options


def look_around(
    data: images.Images, seed: int, options: argparse.Namespace, progress: Callable[[], object]
) -> dict[str, Any]:
    """All that is measured of one seed, as plain data."""
    training, found = solutions(data, seed, progress)
    count = min(options.images, len(data.train_y))
    size = data.experiment.batch_size
    place = next(training.model.parameters()).device
    to_tensor = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).to(place)  # noqa: E731
    batches = [to_tensor(data.train_x[at : at + size]) for at in range(0, count, size)]
    test = to_tensor(data.test_x[: options.images])

    def measure(model: torch.nn.Module) -> dict[str, float]:
        trained = torch.cat([model(batch) for batch in batches]).cpu().numpy()
        tested = torch.cat([model(batch) for batch in test.split(size)]).cpu().numpy()
        return {
            LOSS: score(trained, data.train_y[:count]).nll,
            ERROR: 100 - score(tested, data.test_y[: len(test)]).accuracy,
        }

    model, common = training.model, {"bn_data": batches}
    directions, radii, width = (2, 3, 3) if options.quick else (DIRECTIONS, RADII, WIDTH)
    line = loss_line(
        model, found["w_SGD"], found["w_SWA"], measure, names=("w_SGD", "w_SWA"), **common
    )
    norm = float(torch.cat([w.flatten() for w in found["w_SWA"]]).norm())
    rays = {
        name: loss_rays(
            model,
            found[name],
            measure,
            directions=directions,
            radii=np.linspace(0, norm / 2, radii)[1:].tolist(),
            seed=seed,
            name=name,
            **common,
        )
        for name in ("w_SWA", "w_SGD")
    }
    plane = None
    if seed == 0:
        corners = [found[name] for name in ("w1", "w2", "w_SWA")]
        plane = loss_plane(model, *corners, measure, points=width, **common).to_dict()
    return {
        "line": line.to_dict(),
        "rays": {name: each.to_dict() for name, each in rays.items()},
        "plane": plane,
    }


def draw(found: list[dict[str, Any]], name: str, docs: Path) -> None:
    """The pictures: of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 2)
    plane = plots.from_dict(found[0]["plane"])
    line = plots.from_dict(found[0]["line"])
    for ax, measure in zip(top, (LOSS, ERROR), strict=True):
        plane.draw(ax, measure=measure)
    line.draw(bottom[0])
    for each in found[0]["rays"].values():
        plots.from_dict(each).draw(bottom[1], measure=LOSS)
    figure.savefig(docs / f"landscape-{name}.png", dpi=110)


def page(results: dict[str, Any]) -> str:
    """What the data say, over the seeds."""
    found = results["seeds"]
    lines = [plots.from_dict(each["line"]) for each in found]
    at = {
        measure: {
            name: [float(np.interp(where, line.positions, line.values(measure))) for line in lines]
            for name, where in (("w_SGD", 0.0), ("w_SWA", 1.0))
        }
        for measure in (LOSS, ERROR)
    }
    barriers = [line.barrier(LOSS).height for line in lines]
    rises = {
        name: [plots.from_dict(each["rays"][name]).rise(RISE, LOSS) for each in found]
        for name in ("w_SWA", "w_SGD")
    }
    # The median, since some rays may not rise so far.
    radii = {name: [rise.median for rise in each] for name, each in rises.items()}
    steeper = paired(*([_rise_halfway(each["rays"][name]) for each in found] for name in rises))
    directions = len(rises["w_SWA"][0].radii)
    rows = "\n".join(
        f"| {name} | {np.mean(at[LOSS][name]):.4f} | {np.mean(at[ERROR][name]):.2f} | "
        f"{np.mean(radii[name]):.3f} |"
        for name in ("w_SGD", "w_SWA")
    )
    experiment = results["experiment"]
    name = experiment["name"]
    return f"""\
# The loss around the average: {experiment["dataset"]}, {experiment["network"]}

Written by `{results["command"]}`: {len(found)} seeds, means over them; {results["images"]} images
of each set. One budget of SGD (`w_SGD`, annealed) and of SWA at a constant rate (`w_SWA`), batch
norm recomputed at each place.

| | training loss | test error [%] | median radius where the training loss is {RISE} higher |
|---|---|---|---|
{rows}

- The distance from one to the other is {np.mean([line.length for line in lines]):.2f}; on the line
  between them the training loss rises above its straight interpolation by {np.mean(barriers):.4f}.
- A quarter of the weights' norm away from it, along {directions} random directions, the training
  loss has risen by more around SWA than around SGD by {steeper.mean:+.4f} [{steeper.low:+.4f},
  {steeper.high:+.4f}] (95 %, paired by seed), p = {steeper.p:.3f} (sign-flip test; with
  {len(found)} seeds not less than {2 / 2 ** len(found)}). Distances are in weight space, where the
  scale of weights before batch norm counts: flatter is no proof of better generalisation.

Above: the plane through the first snapshot `w1`, the last one `w2` and their average; below: the
line and random directions; of the first seed.

![Loss and error over the plane, along the line and along random directions](landscape-{name}.png)
"""


def _rise_halfway(saved: dict[str, Any]) -> float:
    """How much the training loss is higher at half the largest radius: the mean of the rays."""
    values = plots.from_dict(saved).values(LOSS)
    return float(np.mean(values[:, values.shape[1] // 2] - values[:, 0]))


def main() -> None:
    options = arguments()
    experiment = settings.load(HERE / "experiments" / f"{options.experiment}.toml")
    path = options.results / f"landscape-{experiment.name}.json"
    if options.report:
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        if options.quick:
            experiment = experiment.tiny()
        data = images.load(experiment, options.data, options.cache)
        cache, found = Cache(options.cache), []
        epochs = sum(
            min(arm.end, experiment.epochs) - arm.begin
            for arm in arms(experiment)
            if arm.name in ("trunk", "annealed", "approach", "constant")
        )
        for seed in range(options.seeds):
            key = cache.key(
                {**experiment.to_dict(), "landscape": [seed, options.images, options.quick]}
            )
            if (around := cache.load(key)) is None:
                with tqdm(total=epochs, unit="epoch", desc=f"seed {seed}") as bar:
                    around = look_around(data, seed, options, bar.update)
                cache.store(key, around)
            found.append(around)
        about = machine.description(("swa-core", "numpy", "torch"))
        shown = " --quick" if options.quick else f" --data FOLDER --images {options.images}"
        results = {
            "command": f"python benchmarks/landscape.py {experiment.name}{shown}",
            "machine": {key: about[key] for key in ("cpu", "cores", "python", "versions")},
            "experiment": experiment.to_dict(),
            "images": options.images,
            "seeds": found,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    options.docs.mkdir(parents=True, exist_ok=True)
    draw(results["seeds"], experiment.name, options.docs)
    text = page(results)
    (options.docs / f"landscape-{experiment.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
