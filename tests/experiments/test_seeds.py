"""A seed's arms: computed once, interrupted anywhere, the same in the end. On stand-in weights."""

import sys
import types
from pathlib import Path

import experiments
import numpy as np
import pytest
from experiments import seeds, settings
from experiments.arms import arms
from experiments.cache import Cache
from experiments.images import Images


class Counting:
    """A training of one number: what it has seen, in order. It fails when it is told to."""

    fail_at: tuple[str, int] | None = None
    epochs = 0

    def __init__(self, images, seed):
        self.seen, self.taken = f"seed {seed}", {}

    def begin(self, arm):
        self.arm = arm
        self.taken = {name: [] for name, _ in arm.averages}

    def epoch(self, batches, epoch):
        if type(self).fail_at == (self.arm.name, epoch):
            raise KeyboardInterrupt
        self.seen += f" {epoch}@{self.arm.rate(epoch):.4f}:{sum(y.sum() for _, y in batches)}"
        type(self).epochs += 1
        for taken in self.taken.values():
            taken.append(2 * (epoch + 1 - self.arm.begin))

    def snapshots(self, average):
        return self.taken[average]

    def logits(self, average, *, bn, images=None):
        rng = np.random.default_rng(list(f"{self.seen}{average}{bn}".encode()))
        return rng.normal(size=(200, 10))[:images]

    def state(self, *, averages):
        return {"seen": self.seen, **({"taken": self.taken} if averages else {})}

    def restore(self, state):
        self.seen = state["seen"]
        self.taken |= state.get("taken", {})


@pytest.fixture
def run(tmp_path, monkeypatch):
    module = types.ModuleType("counting_training")
    module.Training = Counting
    monkeypatch.setitem(sys.modules, "counting_training", module)
    monkeypatch.setitem(seeds.FRAMEWORKS, "counting", "counting_training")
    monkeypatch.setattr(seeds, "CHECKPOINT_AFTER", -1.0)
    monkeypatch.setattr(Counting, "fail_at", None)
    monkeypatch.setattr(Counting, "epochs", 0)
    experiment = settings.load(Path(experiments.__file__).parent / "cifar10.toml").tiny()
    labels = np.arange(200, dtype=np.int32) % 10
    pictures = np.zeros((200, 8, 8, 1), np.float32)
    images = Images(experiment, pictures, labels, pictures, labels)

    def run(folder, seed=0):
        passed = []
        one = seeds.Seed(images, "counting", seed, Cache(tmp_path / folder), passed.append)
        found = one.run()
        assert sum(passed) == sum(arm.end - arm.begin for arm in arms(experiment))
        return {name: {**each, "seconds": 0} for name, each in found.items()}

    return run


def test_the_second_run_computes_nothing(run):
    first = run("a")
    computed = Counting.epochs
    assert run("a") == first
    assert Counting.epochs == computed > 0


def test_interrupted_anywhere_it_ends_the_same_and_loses_one_epoch_at_most(run):
    whole = run("whole")
    computed, Counting.epochs = Counting.epochs, 0
    points = [("trunk", 2), ("annealed", 3), ("constant", 5), ("constant", 9), ("cyclical", 7)]
    for point in points:
        Counting.fail_at = point
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    Counting.fail_at = None
    assert run("broken") == whole
    assert Counting.epochs == computed


def test_a_lost_arm_is_computed_again_from_the_beginning_it_needs(run, tmp_path):
    whole = run("a")
    for path in (tmp_path / "a").glob("*.json"):
        kept = path.read_bytes()
        path.unlink()
        assert run("a") == whole
        assert path.read_bytes()[:20] == kept[:20]


def test_other_seeds_are_other_results(run):
    assert run("a", seed=1)["annealed"]["scores"] != run("a", seed=0)["annealed"]["scores"]


def test_nothing_is_left_but_results(run, tmp_path):
    run("a")
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".json"}
