"""A run is stored and found again, goes on where it was stopped, and says what disturbed it."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import machine
import pytest
from speed import page, plots, running, text
from speed.comparing import compare
from speed.fits import Fit
from speed.growth import Curve
from speed.joining import Entry, Ratio, Row
from speed.parts import Part
from speed.run import Run, from_json, store, stored, to_json

ABOUT = {"cpu": "AMD EPYC", "cores": 2, "memory": 25, "system": "Linux x86_64", "python": "3.11.7"}
PART = {"part": "torch", "growth": False, "command": ["torch_overhead.py"], "seconds": 2.0}
PART |= {"cpu": 3.0, "load_before": 0.1, "load_after": 1.5, "others": 0.02}


def a_run(**changes):
    out = Run("2026-11-24", ["speed.py"], False, {**ABOUT, "versions": {"numpy": "2.4"}})
    out.parts = [dict(PART)]
    out.entries = [Entry("torch", "snapshot", "x", "swa_torch", "C loop", Ratio(1.0, 2.0, 3.0))]
    ratio = Ratio(1.0, 1.25, 2.0)
    out.rows = [Row("torch", "swa_torch", ratio, None, ratio, False, 1.0, None, 0.5, ["a | b"])]
    seconds = [(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)]
    out.curves = [
        Curve("torch", "weights", 100, who, [1, 10], seconds, Fit(1, 0.1))
        for who in ("C loop", "swa_torch", "torch-ema")
    ]
    return replace(out, **changes)


def test_a_run_is_read_as_it_was_written():
    assert from_json(to_json(a_run())) == a_run()
    assert json.loads(to_json(a_run(entries=[], curves=[])))["entries"] == []


def test_the_last_run_of_such_a_machine_is_found(tmp_path):
    def another(number):
        ratio = Ratio(1.0, 2.0, 3.0 + number)
        return a_run(entries=[Entry("torch", "snapshot", "x", "swa_torch", "C loop", ratio)])

    first = store(a_run(date="2026-11-09"), tmp_path)
    second = store(a_run(), tmp_path)
    again = [store(another(number), tmp_path) for number in range(1, 10)][-1]
    store(a_run(quick=True, date="2026-11-25"), tmp_path)
    other = store(a_run(date="2026-11-26", about={**a_run().about, "cores": 64}), tmp_path)
    assert second.name == "2026-11-24-amd-epyc-2-cores.json"
    assert other.name == "2026-11-26-amd-epyc-64-cores.json"
    found = list(stored(tmp_path, ABOUT, quick=False))
    assert again.name == "2026-11-24-amd-epyc-2-cores.10.json"
    assert (found[0], found[-2], found[-1]) == (again, second, first)
    assert len(list(stored(tmp_path, ABOUT, quick=True))) == 1


def test_a_run_that_went_on_takes_the_place_of_what_it_began_with(tmp_path):
    new = Entry("optax", "snapshot", "x", "swa_optax", "C loop", Ratio(1.0, 2.0, 3.0))
    more = [*a_run().entries, new]
    path = store(a_run(), tmp_path)
    assert store(a_run(entries=more), tmp_path) == path
    assert from_json(path.read_text()).entries == more
    measured_again = a_run(entries=[more[0]._replace(ratio=Ratio(1.0, 2.0, 3.1))])
    assert store(measured_again, tmp_path) != path


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A part that counts how often it ran, and fails when it is told to."""
    monkeypatch.setattr("speed.parts.FOLDER", tmp_path)
    counter, fail = tmp_path / "count", tmp_path / "fail"
    (tmp_path / "part.py").write_text(
        "import pathlib, sys\n"
        f"count = pathlib.Path({str(counter)!r})\n"
        "count.write_text(str(int(count.read_text()) + 1) if count.exists() else '1')\n"
        f"if pathlib.Path({str(fail)!r}).exists(): sys.exit('out of luck')\n"
        "pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text('{\"tables\": []}')\n"
    )
    return counter, fail


def test_a_part_that_is_done_is_not_run_again(script, tmp_path):
    counter, _ = script
    part = Part("torch", ("part.py",), ())
    first = running.run(part, tmp_path / "run", 5, quick=False)
    assert first["found"] == {"tables": []}
    assert first["command"] == ["part.py", "--rounds", "5"]
    assert not first["resumed"]
    again = running.run(part, tmp_path / "run", 5, quick=False)
    assert again["resumed"]
    assert again["found"] == first["found"]
    assert counter.read_text() == "1"
    running.run(part, tmp_path / "run", 6, quick=False)  # which is something else
    running.run(replace(part, environment={"A": "B"}), tmp_path / "run", 6, quick=False)
    assert counter.read_text() == "3"


def test_a_part_that_failed_says_why_and_is_run_again(script, tmp_path):
    counter, fail = script
    part = Part("torch", ("part.py",), ())
    fail.touch()
    record = running.run(part, tmp_path / "run", 3, quick=True)
    assert "part.py ended with 1: out of luck" in record["failed"]
    result = a_run(rows=[], parts=[])
    result.add(record)
    assert "out of luck" in text.joined(result)
    assert "FAILED" in text.parts(result)
    fail.unlink()
    assert "found" in running.run(part, tmp_path / "run", 3, quick=True)
    assert counter.read_text() == "2"


def test_what_is_not_installed_is_said(tmp_path):
    part = Part("torch", ("part.py",), ("no_such_package", "sys"))
    record = running.run(part, tmp_path, 3, quick=True)
    assert record["failed"] == "NOT INSTALLED: no_such_package"
    result = a_run(rows=[], parts=[], left_out=[])
    result.add(record)
    result.add(record | {"growth": True})
    assert "NOT INSTALLED" in text.joined(result)
    assert result.left_out == ["torch: NOT INSTALLED: no_such_package"]


def test_a_loaded_machine_is_marked():
    assert running.disturbed([PART]) == []
    (said,) = running.disturbed([PART | {"load_before": 2.0}])
    assert said == "the load before the first part was 2.0"
    # Later, the load is that of the parts before.
    assert running.disturbed([PART, PART | {"load_before": 2.0}]) == []
    (said,) = running.disturbed([PART, PART | {"others": 0.7, "growth": True}])
    assert said == "growth-torch: others kept 0.7 cores busy meanwhile"
    assert "loaded machine" in text.conditions(a_run(disturbed=[said]))
    assert "loaded" not in text.conditions(a_run())


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot be known there")
def test_own_work_is_not_that_of_others(monkeypatch):
    busy = itertools.count(100.0, 2.0)  # seconds
    monkeypatch.setattr(machine, "_busy", lambda: next(busy))
    own = iter([10.0, 11.5])
    monkeypatch.setattr(machine, "own_seconds", lambda: next(own))
    clock = iter([0.0, 5.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    assert machine.Others().cores() == pytest.approx(0.1)


def test_the_page_has_everything(tmp_path):
    run = a_run(left_out=["optax: 500 takes 99 GB"])
    plot = plots.growth(run.curves, tmp_path / "speed-growth.png")
    assert plot.stat().st_size > 10_000
    file = tmp_path / "docs" / "speed.md"
    page.write(run, file, compare("old.json", run.entries, run.entries), plot)
    written = file.read_text()
    assert "| torch | swa_torch | 1.25 (1.00-2.00) " in written
    assert "a \\| b" in written
    assert "![Seconds" in written
    assert "- optax: 500 takes 99 GB" in written
    assert "1 ratios compared with old.json" in written
    assert str(tmp_path) not in written


def test_without_growth_there_is_no_plot(tmp_path):
    assert plots.growth([], tmp_path / "plot.png") is None
    page.write(a_run(curves=[]), tmp_path / "speed.md", None, None)
    written = (tmp_path / "speed.md").read_text()
    assert "## Growth" not in written
    assert "nothing was compared" in written
