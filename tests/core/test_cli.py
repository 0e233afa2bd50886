"""The command ``swa``: what it prints, for people and for programs, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from swa_core import (
    EMA,
    LearningRate,
    Schedule,
    SWAConfig,
    SWAState,
    learning_rate,
    save_average,
)
from swa_core.cli import main
from swa_core.safetensors_files import write

CONFIG = SWAConfig(start="75%", every="1ep", lr=LearningRate(value=0.05, anneal="1ep"))
LENGTHS = ["--epochs", "20", "--steps-per-epoch", "40"]


@pytest.fixture
def swa(capsys):
    """Runs the command; gives status, stdout and stderr."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def config(tmp_path):
    CONFIG.dump(tmp_path / "swa.toml")
    return tmp_path / "swa.toml"


def test_plan_draws_snapshots_and_rate(swa, config):
    status, out, err = swa("plan", config, *LENGTHS, "--rate", 0.1, "--parameters", "25.6M")
    assert (status, err) == (0, "")
    lines = {line[:12].strip(): line[12:] for line in out.splitlines() if line.startswith("  ")}
    # 64 columns for 20 epochs: the last six snapshots fall on epochs 15 to 20.
    assert {place for place, bar in enumerate(lines["snapshots"]) if bar != " "} == {
        -(-epoch * 64 // 20) - 1 for epoch in range(15, 21)
    }
    assert len(lines["rate"]) == 64
    assert lines["rate"][0] > lines["rate"][-1]
    assert "6 snapshots: the first at update 600 (epoch 15), the last at update 800" in out
    assert "102 MB in float32" in out


def test_plan_tells_programs_the_same_figures(swa, config):
    _, out, _ = swa("plan", config, *LENGTHS, "--rate", 0.1, "--json")
    figures = json.loads(out)
    assert (figures["snapshots"], figures["schedule"]) == (6, [600, 40, None])
    assert sum(figures["snapshots_by_column"]) == 6
    lr = CONFIG.lr_schedule(steps_per_epoch=40, total_steps=800)
    ends = [round(800 * (column + 1) / 64) for column in range(64)]
    assert figures["rate_by_column"] == [float(learning_rate(end, 0.1, lr)) for end in ends]
    figures = json.loads(swa("plan", config, *LENGTHS, "--json")[1])
    # Without the base rate only what does not depend on it is known.
    known = [rate is not None for rate in figures["rate_by_column"]]
    assert known == [end >= 640 for end in ends]


def test_plan_of_a_training_without_a_snapshot_fails(swa, config):
    status, out, err = swa("plan", config, "--epochs", 1, "--steps-per-epoch", 1)
    assert (status, out) == (0, out)
    SWAConfig(start="30ep", every="1ep").dump(config)
    status, out, err = swa("plan", config, *LENGTHS)
    assert (status, out) == (1, "")
    assert err.startswith("swa plan: 1 fault")
    assert "Start sooner" in err


def test_a_missing_file_is_told_without_a_traceback(swa, tmp_path):
    status, out, err = swa("plan", tmp_path / "none.toml", *LENGTHS)
    assert (status, out) == (1, "")
    assert err.startswith("swa plan: ")
    assert "none.toml" in err


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--epochs", "x"], ["--parameters", "7Q"]])
def test_wrong_usage_exits_with_2(swa, config, wrong):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(config), *LENGTHS, *wrong])
    assert exit_.value.code == 2


def test_inspect_shows_an_average(swa, tmp_path):
    file = tmp_path / "average.safetensors"
    average = {"dense/kernel": np.zeros((3, 2), "f4"), "dense/bias": np.zeros(2, "f8")}
    config = SWAConfig(start="4step", every="2step", rule=EMA(0.5))
    save_average(
        file, SWAState(9, 3, 1, 1.75, average), config, schedule=Schedule(4, 2), framework="torch"
    )
    status, out, err = swa("inspect", file)
    assert (status, err) == (0, "")
    for part in (
        "average.safetensors: 2 tensors, 40 B",
        "3 snapshots after 9 updates, saved by torch",
        "name = ema, decay = 0.5; worth 2.333 equally",
        "1 snapshot with NaN",
        "[4, 2, None]",
        f"numpy {np.__version__}",
        "dense/kernel  float32   (3, 2)",
        "dense/bias    float64   (2,)",
        "format: pt",
    ):
        assert part in out, part
    figures = json.loads(swa("inspect", file, "--json")[1])
    assert figures["average"]["config"] == config.to_dict()
    assert figures["tensors"]["dense/bias"] == {"dtype": "float64", "shape": [2], "bytes": 16}


def test_inspect_shows_any_safetensors_file(swa, tmp_path):
    write(tmp_path / "plain", {"w": np.zeros(3, np.int8)}, {"by": "hand"})
    status, out, _ = swa("inspect", tmp_path / "plain")
    assert status == 0
    assert out == "plain: 1 tensor, 3 B\n  by: hand\n  w  int8      (3,)\n"
    (tmp_path / "broken").write_bytes(b"\0" * 100)
    status, out, err = swa("inspect", tmp_path / "broken")
    assert (status, out) == (1, "")
    assert "broken: it is no safetensors file" in err


def test_it_runs_as_a_module(config):
    command = [sys.executable, "-m", "swa_core.cli", "plan", str(config), *LENGTHS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 snapshots" in done.stdout
