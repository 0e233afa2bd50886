"""The benchmark runs, checks what it times, and leaves nobody out without saying so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Who is beside us, and the package that each needs.
PEERS = {
    "AveragedModel": "torch",
    "AveragedModel, swa_multi_avg": "torch",
    "AveragedModel, ema_multi_avg": "torch",
    "torchcontrib SWA": "torchcontrib",
    "timm ModelEmaV3": "timm",
    "ema-pytorch EMA": "ema_pytorch",
    "torch-ema": "torch_ema",
    "Lightning StochasticWeightAveraging": "lightning",
    "Lightning WeightAveraging": "lightning",
}
OURS = {'swa_torch, nonfinite="keep"', 'swa_torch, nonfinite="skip"'}


def run(*arguments):
    paths = [str(BENCHMARKS), *sys.path]
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )


def test_all_contenders_are_measured_or_said_to_be_missing(tmp_path):
    file = tmp_path / "figures.json"
    script = str(BENCHMARKS / "torch_overhead.py")
    done = run(script, "--quick", "--sets", "resnet50", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["command"][:2] == ["torch_overhead.py", "--quick"]
    assert found["machine"]["versions"]["torch"]

    float32, bfloat16, in_and_out, skipped, *_ = found["tables"]
    here = {peer for peer, package in PEERS.items() if importlib.util.find_spec(package)}
    for table in (float32, bfloat16):
        rows = set(table["rows"]) - {"C loop"}
        assert rows == OURS | here
        assert set(table["absent"]) - {"C loop"} == PEERS.keys() - here
        for who, row in table["rows"].items():
            assert who in done.stdout
            assert len(row["rounds"]) == 3
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert row["error"] < (1e-6 if row["average"] == "float32" else 1e-1)
    assert bfloat16["rows"]['swa_torch, nonfinite="keep"']["average"] == "float32"
    for who, reason in float32["absent"].items():
        assert f"{who} " in done.stdout
        assert "NOT INSTALLED" in reason
    if sys.platform == "linux":
        assert {"holds", "+ peak", "faults"} <= float32["rows"][
            'swa_torch, nonfinite="keep"'
        ].keys()
    assert {'swa_torch, nonfinite="keep"', "AveragedModel"} <= in_and_out["rows"].keys()
    assert {"swa_torch", "the bare optimizer's step"} <= skipped["rows"].keys()
    trainings = [table for table in found["tables"] if table["kind"] == "training"]
    assert [table["of"] for table in trainings] == ["SGD, 0.0 M", "Adam, 0.0 M"]
    for table in trainings:
        assert {*OURS, *here, "plain training", "swa_torch, never due"} <= table["rows"].keys()
        assert table["rows"]['swa_torch, nonfinite="keep"']["error"] < 1e-6


def test_a_wrong_average_is_not_timed_in_silence():
    # Ours is a mean; the benchmark is told that it is an exponential moving average.
    done = run(
        "-c",
        "import dataclasses, torch_peers, torch_tables\n"
        "ours = dataclasses.replace(torch_peers.CONTENDERS[1], mix=torch_peers.moving)\n"
        "bench = torch_tables.Bench(rounds=3, tiny=True, here=[ours], absent={})\n"
        "torch_tables.snapshots(bench, 'resnet50', 'float32')\n",
    )
    assert done.returncode == 1
    assert "AssertionError: swa_torch" in done.stderr
    assert "the average is off by" in done.stderr
