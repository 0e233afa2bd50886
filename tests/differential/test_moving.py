"""An average that moves between the frameworks is the one of a training in a single one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drivers.keras_driver import KerasDriver
from drivers.optax_driver import OptaxDriver
from drivers.torch_driver import TorchDriver

import swa_keras
import swa_optax
from swa_core import Schedule, SWAConfig, load_average
from swa_core.testing import CoreDriver, scripts

LENGTHS = {"steps_per_epoch": 3, "total_steps": 20}
SCHEDULE = Schedule(6, 3, None)
TRANSPOSED = {"kernel": np.transpose}


class Torch(TorchDriver):
    """With the kernel as a torch ``Linear`` has it."""

    def train(self, weights):
        super().train(turned(weights))

    def average(self):
        return turned(super().average())

    def save_to(self, file):
        self.optimizer.save_average(file, self.model)

    def load_from(self, file, change):
        self.optimizer.load_average(file, self.model, names=names_in(file), transform=change)


class Keras(KerasDriver):
    def save_to(self, file):
        self.swa.save(file)

    def load_from(self, file, change):
        held = names_in(file)
        paths = {name: v.path for name, v in self.model.named.items()}
        self.swa = swa_keras.SWA.load(
            file,
            model=self.model,
            names={path: held[name] for name, path in paths.items()},
            transform={paths[name]: function for name, function in change.items()},
        )
        self.swa.begin(self.model, **LENGTHS)


class Optax(OptaxDriver):
    def save_to(self, file):
        config = SWAConfig(start="25%", every="1ep", rule=self.rule)
        swa_optax.save_average(file, self.state, config, schedule=self.schedule)

    def load_from(self, file, change):
        self.state = swa_optax.load_average(
            file,
            self.state,
            config=SWAConfig(rule=self.rule),
            schedule=self.schedule,
            names=names_in(file),
            transform=change,
        )


def names_in(file):
    """The leaves' names in a file; Keras' are paths, with the model before them."""
    return {name.split("/")[-1]: name for name in load_average(file).state.average}


def turned(weights):
    return {**weights, "kernel": np.ascontiguousarray(weights["kernel"].T)}


@pytest.mark.parametrize("rule", scripts.EXACT_RULES, ids=str)
@pytest.mark.parametrize(
    "order",
    [*itertools.permutations([Torch, Optax, Keras])],
    ids=lambda order: " to ".join(make.__name__ for make in order),
)
def test_three_frameworks_make_one_average(tmp_path, order, rule):
    config = SWAConfig(start="25%", every="1ep", rule=rule)
    script = scripts.exact(rule, SCHEDULE, 20)
    reference = CoreDriver()
    reference.start(scripts.whole(0), config, **LENGTHS)
    for weights in script:
        reference.train(weights)
    previous = None
    # The first change of hands comes right after a snapshot, the second between two.
    for make, (begin, end) in zip(order, [(0, 9), (9, 14), (14, 20)], strict=True):
        run = make()
        first = scripts.whole(0)
        run.start(turned(first) if isinstance(run, Torch) else first, config, **LENGTHS)
        if previous is not None:
            lie_otherwise = isinstance(run, Torch) != isinstance(previous, Torch)
            run.load_from(tmp_path / "average", TRANSPOSED if lie_otherwise else {})
        for weights in script[begin:end]:
            run.train(weights)
        run.save_to(tmp_path / "average")
        previous = run
    assert run.n_averaged() == reference.n_averaged()
    average = run.average()
    for name, leaf in reference.average().items():
        assert average[name].dtype == leaf.dtype
        assert average[name].tobytes() == leaf.tobytes(), name
    found = load_average(tmp_path / "average")
    assert (found.schedule, found.config, found.state.updates) == (SCHEDULE, config, 20)
