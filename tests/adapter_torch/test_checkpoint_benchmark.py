"""The benchmark of averaging checkpoints runs, and checks what it times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import checkpoint_average
        import checkpoint_contenders
        import checkpoint_sets

        yield checkpoint_average, checkpoint_contenders, checkpoint_sets
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(params=["float32", "bfloat16"])
def bench(request, modules, tmp_path, monkeypatch):
    average, _, sets = modules
    monkeypatch.setattr(sets, "WIDTH", 24)
    paths = sets.make(tmp_path, 5, 1, request.param)
    return average.Bench(tmp_path, paths, request.param, None)


def test_every_contender_gives_the_mean(modules, bench):
    average, contenders, sets = modules
    files = [str(path) for path in bench.paths]
    for name in contenders.CONTENDERS.keys() - bench.absent().keys():
        contenders.CONTENDERS[name]()(files, str(bench.result(name)))
        assert bench.error(name) <= 4 * sets.TOLERANCE[bench.dtype]
    assert "NOT INSTALLED" in bench.absent()[average.MERGEKIT]


def test_a_wrong_mean_is_not_timed_in_silence(modules, bench):
    average, contenders, _ = modules
    name = average.OURS[0]
    files = [str(path) for path in bench.paths]
    contenders.CONTENDERS[name]()(files[:4], str(bench.result(name)))
    with pytest.raises(AssertionError, match="the mean is off by"):
        bench.error(name)


@pytest.mark.parametrize("bench", ["float32"], indirect=True)
def test_a_table_of_processes(modules, bench):
    average, *_ = modules
    names = [name for name in (average.FLOOR, *average.OURS) if name not in bench.absent()]
    found = bench.measure(names, 2, {}).figures()
    assert found["rows"].keys() == set(names)
    ours = found["rows"][average.OURS[0]]
    assert len(ours["rounds"]) == 2
    assert ours["error"] < 1e-6
    assert 0 < ours["start"] < 60
    if sys.platform == "linux":
        assert 0 < ours["beyond"] < 200
        assert ours["mapped"] > 0


@pytest.mark.parametrize("bench", ["float32"], indirect=True)
def test_a_contender_that_fails_says_why(modules, bench):
    average, *_ = modules
    bench.paths[0].write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"(?s)no-hash failed.*StateError: cannot read"):
        bench.run(average.OURS[0])
