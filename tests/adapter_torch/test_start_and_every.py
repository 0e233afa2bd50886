"""The trainings of the sweep: not touched by what is averaged, computed once, whole in the end."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from experiments import sweep_runs
from experiments.cache import Cache
from experiments.sweep_plan import Cell, Plan
from experiments.sweep_training import Split, run, split


def part(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


DATA = Split(part(40, 0), part(20, 1), part(20, 2))
SMALL = Plan.load(quick=True)
PLAN = replace(SMALL, training=replace(SMALL.training, epochs=4, batch_size=20, bn_images=40))


def test_averaging_does_not_touch_the_training():
    few = replace(PLAN, starts=("75%",), everies=("1ep",))
    one, other = run(PLAN, DATA, "constant", 3), run(few, DATA, "constant", 3)
    assert one["last"] == other["last"]
    assert one["cells"][PLAN.cells().index(Cell("75%", "1ep"))] == other["cells"][0]


def test_an_average_of_the_last_weights_alone_is_the_last_weights():
    plan = replace(PLAN, starts=("100%",), default=Cell("100%", "1ep"))
    found = run(plan, DATA, "constant", 0)
    assert [cell["n_averaged"] for cell in found["cells"]] == [1, 1, 1]
    for cell in found["cells"]:
        assert cell["test"] == found["last + update_bn"]["test"]


def test_rates_share_initialisation_and_images():
    # The same rate under two names: all that differs would come from elsewhere.
    plan = replace(PLAN, rates={**PLAN.rates, "again": PLAN.rates["constant"]})
    assert run(plan, DATA, "constant", 1) == run(plan, DATA, "again", 1)
    assert run(plan, DATA, "constant", 1) != run(plan, DATA, "constant", 2)
    assert run(plan, DATA, "constant", 1) != run(plan, DATA, "cosine", 1)


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    cache, computed = Cache(tmp_path), []

    def failing(plan, data, rate, seed, progress):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append((rate, seed))
        return run(plan, data, rate, seed, progress)

    monkeypatch.setattr(sweep_runs, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        sweep_runs.collect(PLAN, "invented", DATA, [0, 1], cache)
    before = list(computed)
    computed.clear()
    computed.append(None)  # three more
    with pytest.raises(KeyboardInterrupt):
        sweep_runs.collect(PLAN, "invented", DATA, [0, 1], cache)
    computed.remove(None)
    assert before == [("constant", 0), ("cosine", 0), ("paper", 0)]
    assert computed == [("constant", 1), ("cosine", 1)]


def test_another_plan_is_another_result():
    keys = {
        sweep_runs.key(plan, dataset, rate, seed)
        for plan in (PLAN, replace(PLAN, starts=("75%",)), SMALL)
        for dataset in ("digits", "cifar10")
        for rate in ("constant", "cosine")
        for seed in (0, 1)
    }
    assert len(keys) == 24


def test_held_out_images_are_no_training_images():
    class Digits:
        train_x = torch.arange(80.0).reshape(80, 1, 1, 1).numpy()
        train_y = torch.arange(80).numpy()
        test_x = torch.arange(30.0).reshape(30, 1, 1, 1).numpy()
        test_y = torch.arange(30).numpy()

    training = replace(PLAN.training, train_images=1000, held_out=1000, test_images=12)
    found = split(Digits, training)
    trained, kept = set(found.train[1].tolist()), set(found.held_out[1].tolist())
    assert (len(trained), len(kept), len(found.test[1])) == (60, 20, 12)
    assert not trained & kept
    assert torch.equal(found.train[0].flatten().long(), found.train[1])


def test_the_command_trains_and_draws(tmp_path, monkeypatch):
    command = importlib.import_module("start_and_every")
    words = ["start_and_every.py", "--quick", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*words, "--cache", str(tmp_path / "cache")])
    threads = torch.get_num_threads()
    try:
        command.main()
        result = json.loads((tmp_path / "out" / "start_and_every-digits.json").read_text())
        assert result["command"] == (
            "python benchmarks/start_and_every.py --dataset digits --quick --seeds 2"
        )
        assert result["n_averaged"] == [31, 4, 2, 11, 2, 1]
        assert str(tmp_path) not in json.dumps(result)
        page = tmp_path / "out" / "start-and-every.md"
        before = page.read_text()
        assert "## digits" in before
        assert (tmp_path / "out" / "start-and-every-digits.png").stat().st_size > 10_000
        monkeypatch.setattr("sys.argv", [*words, "--report"])
        command.main()
        assert page.read_text() == before
    finally:
        torch.set_num_threads(threads)
