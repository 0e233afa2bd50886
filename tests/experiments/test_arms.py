"""The arms are the paper's schedules, and sharing their beginnings changes none of them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import experiments
import pytest
from experiments import settings
from experiments.arms import arms

from swa_core import ConfigError, learning_rate

FOLDER = Path(experiments.__file__).parent


@pytest.fixture(params=["fashion-mnist", "cifar10"])
def experiment(request):
    return settings.load(FOLDER / f"{request.param}.toml")


def rates(every, name):
    """The rate of each epoch of an arm, from the initial weights on."""
    by_name = {arm.name: arm for arm in every}
    arm = by_name[name]
    before = [] if arm.after is None else rates(every, arm.after)
    assert len(before) == arm.begin
    return before + [arm.rate(epoch) for epoch in range(arm.begin, arm.end)]


def test_sharing_a_beginning_changes_no_schedule(experiment):
    every = arms(experiment)
    for arm in every:
        own = [arm.rate(epoch) for epoch in range(arm.end)]
        assert rates(every, arm.name) == pytest.approx(own)


def test_schedules_are_those_of_the_authors_code(experiment):
    every = arms(experiment)
    budget, start = experiment.epochs, experiment.start
    annealed, constant = rates(every, "annealed"), rates(every, "constant")
    assert annealed[: budget // 2 + 1] == [experiment.rate] * (budget // 2 + 1)
    assert annealed[-1] == pytest.approx(experiment.rate / 100)
    assert all(a >= b for a, b in pairwise(annealed))
    assert constant[start:] == [experiment.swa_rate] * (len(constant) - start)
    assert constant[: start // 2 + 1] == [experiment.rate] * (start // 2 + 1)


def test_budgets_are_equal_where_they_are_called_so(experiment):
    lengths = {arm.name: arm.end for arm in arms(experiment)}
    assert lengths["annealed"] == lengths["cyclical"] == experiment.epochs
    assert lengths["annealed 1.25"] == lengths["constant"] == experiment.epochs * 5 // 4


def test_snapshots_are_those_of_the_experiments_own_table(experiment):
    steps = experiment.steps_per_epoch
    whole = experiment.config.schedule(steps_per_epoch=steps, total_steps=steps * experiment.epochs)
    for arm in arms(experiment):
        for name, config in arm.averages:
            if name == "swa":
                part = config.schedule(steps_per_epoch=steps)
                updates = range(1, (arm.end - arm.begin) * steps + 1)
                taken = [arm.begin * steps + u for u in updates if part.is_snapshot(u)]
                assert taken == [u for u in range(arm.end * steps + 1) if whole.is_snapshot(u)]


def test_a_cycle_ends_where_a_snapshot_falls(experiment):
    (cyclical,) = (arm for arm in arms(experiment) if arm.name == "cyclical")
    ((_, config),) = cyclical.averages
    steps = experiment.steps_per_epoch
    schedule = config.schedule(steps_per_epoch=steps)
    rates = config.lr_schedule(steps_per_epoch=steps)
    second = schedule.start + schedule.every
    assert learning_rate(second, 0.1, rates) == pytest.approx(experiment.cycle_low)


BAD = {
    "rat = 0.1": "rat is unknown",
    'epochs = "16"': "epochs = '16' should be of type int",
    "epochs = 15": "multiple of 4",
    "batch_size = 300": "divide",
}


@pytest.mark.parametrize("line", BAD)
def test_a_faulty_experiment_is_refused_by_name(tmp_path, line):
    lines = (FOLDER / "cifar10.toml").read_text().splitlines()
    key = line.split(" ")[0]
    lines = [each for each in lines if each.split(" ")[0] != key]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(SystemExit, match=BAD[line]):
        settings.load(path)


def test_a_missing_key_and_a_missing_file_are_refused(tmp_path):
    text = (FOLDER / "cifar10.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("momentum = 0.9", ""))
    with pytest.raises(SystemExit, match="momentum is missing"):
        settings.load(path)
    with pytest.raises(SystemExit, match="is no experiment"):
        settings.load(tmp_path / "other.toml")
    path.write_text(text.replace('start = "75%"', "start = 75"))
    with pytest.raises(ConfigError, match="no unit"):
        settings.load(path)


def test_a_start_within_an_epoch_is_refused(experiment):
    config = replace(experiment.config, start="70step", every="1step")
    with pytest.raises(SystemExit, match="whole number of epochs"):
        arms(replace(experiment, config=config))
