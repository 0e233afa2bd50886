"""A few of the fuzzer's files, so that it stays able to run, and that it sees what is wrong."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from fuzz import worker
from fuzz.formats import FORMATS
from fuzz.run import fuzz, main

from swa_core import StateError

FEW = 24


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_mutated_files_are_read_or_refused(request, tmp_path, form):
    if form.adapter is not None and form.adapter not in request.config.adapters:
        pytest.skip(f"{form.adapter} is not among the chosen adapters")
    _, *said = worker.went(form, 0, FEW, tmp_path, contextlib.nullcontext())
    assert len(said) == FEW
    assert not [(one["seed"], one["fault"]) for one in said if one["fault"]]
    assert sum(one["went"] == "refused" for one in said) > FEW / 10


def test_it_runs_in_processes_and_prints_a_table(capsys):
    assert main(["--count", "5", "--formats", ".npz", "average file"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [
        [" .npz ", " 5 "],
        [" average file ", " 5 "],
    ]


def raising(*arguments):
    raise KeyError("w")


def large(*arguments):
    np.ones(20_000_000).sum()  # 160 MB


def leaving(form, one, other, out):
    out.write_bytes(b"half of it")
    raise StateError("it is damaged, and says so")


def leaving_a_temporary_file(form, one, other, out):
    (out.parent / ".out").write_bytes(b"half of it")


def saying_nothing(*arguments):
    raise StateError("")


@pytest.mark.parametrize(
    ("reader", "fault"),
    [
        (raising, "KeyError: 'w'"),
        (large, "bytes of memory"),
        (leaving, "left behind"),
        (leaving_a_temporary_file, "left behind"),
        (saying_nothing, "an error that says nothing"),
    ],
)
def test_a_fault_is_seen(tmp_path, monkeypatch, reader, fault):
    saying = worker.went(FORMATS[0], 0, 1, tmp_path, contextlib.nullcontext())
    next(saying)
    monkeypatch.setattr(worker, "_read", reader)
    assert fault in next(saying)["fault"]


DYING = """
import json, os, sys, time
begin, end = map(int, sys.argv[2:])
print('{"seed": -1}', flush=True)
for seed in range(begin, end):
    if seed == 2:
        os.abort()
    if seed == 4:
        time.sleep(60)
    said = {"seed": seed, "went": "read", "fault": None, "seconds": 0, "peak": 0}
    print(json.dumps(said), flush=True)
"""


def test_crashes_and_hangs_are_seen_and_the_others_are_read():
    found = fuzz("x", 0, 7, worker=("-c", DYING), limit=1.5)
    assert (found.files, found.read, [*found.faults]) == (7, 5, [2, 4])
    assert "exit status -6" in found.faults[2]
    assert "no answer within 1.5 s" in found.faults[4]
