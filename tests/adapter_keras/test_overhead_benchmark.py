"""The benchmark runs on this backend, checks what it times, and leaves nobody out in silence."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BACKEND = keras.backend.backend()


def run(*arguments):
    paths = [str(BENCHMARKS), *sys.path]
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "KERAS_BACKEND": BACKEND,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    )


def test_all_contenders_are_measured_on_this_backend(tmp_path):
    file = tmp_path / "figures.json"
    script = str(BENCHMARKS / "keras_overhead.py")
    done = run(script, "--quick", "--backend", BACKEND, "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["command"][:2] == ["keras_overhead.py", "--quick"]
    fit, float32, bfloat16, in_and_out, skipped = found["tables"]
    assert {table["backend"] for table in found["tables"]} == {BACKEND}
    assert fit["base"] == "plain training"
    assert {"swa_keras, every update", "numpy, get_weights"} <= fit["rows"].keys()
    assert "use_ema, SwapEMAWeights" in fit["rows"]
    ours = {'swa_keras, nonfinite="keep"', 'swa_keras, nonfinite="skip"'}
    for table in (float32, bfloat16):
        assert ours <= table["rows"].keys()
        assert "C loop" in table["rows"] | table["absent"]
        for name in ours:
            assert table["rows"][name]["error"] < 1e-6
            assert len(table["rows"][name]["rounds"]) == 3
    assert in_and_out["rows"]['swa_keras, nonfinite="keep"']["error"] == 0
    assert "swa_keras, the hooks of fit" in skipped["rows"]
    if sys.platform == "linux":
        assert {"holds", "+ peak", "faults"} <= float32["rows"][
            'swa_keras, nonfinite="skip"'
        ].keys()
        assert any("+ in fit" in row for row in fit["rows"].values())
        assert "was not measured" not in done.stdout


def test_a_wrong_average_is_not_timed_in_silence(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("keras_tables")
    # Ours is a mean; the benchmark is told that the newest snapshot alone counts.
    monkeypatch.setattr(tables, "uniform", lambda update: 1.0)
    bench = tables.Bench(rounds=3, tiny=True, absent={"C loop": "not asked"})
    with pytest.raises(AssertionError, match=r"swa_keras.*the average is off by"):
        tables.snapshots(bench, "transformer", "float32")
