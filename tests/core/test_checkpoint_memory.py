"""Memory does not grow with the number or the size of checkpoints, and a budget is kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from swa_core import StateError, memory_budget
from swa_core.checkpoints import average, open_checkpoint, reading
from swa_core.cli import main
from swa_core.cli.counting import size
from swa_core.safetensors_files import packed, write

# Prints the bytes that were resident at the most while it averaged, over what was there before,
# anonymous and mapped together.
AVERAGING = """
import resource, sys
from swa_core import checkpoints

def peak():
    try:
        lines = open("/proc/self/status").readlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
out, hashes, *paths = sys.argv[1:]
plan = checkpoints.average(paths, out, hashes=hashes == "hashes", force=True)
print(peak() - before, plan.memory)
"""
KINDS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def hollow(path, tensors):
    """A checkpoint of zeros that takes no room on the disk."""
    header, place = {}, 0
    for name, (kind, shape) in tensors.items():
        end = place + KINDS[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, end]}
        place = end
    head = packed(header)
    path.write_bytes(head)
    os.truncate(path, len(head) + place)
    return path


def peak_of(tmp_path, number, tensors, hashes="no"):
    paths = [hollow(tmp_path / f"{n}.safetensors", tensors) for n in range(number)]
    command = [sys.executable, "-c", AVERAGING, tmp_path / "out.safetensors", hashes, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.parametrize(
    ("number", "tensors", "hashes"),
    [
        (4, {"w": ["F32", [1 << 20]]}, "no"),
        (40, {"w": ["F32", [1 << 20]]}, "no"),
        (4, {"w": ["F32", [3, 1 << 23]]}, "no"),
        (4, {"w": ["BF16", [1 << 25]], "v": ["F16", [1 << 20]], "u": ["F64", [1 << 20]]}, "hashes"),
    ],
)
def test_the_peak_is_that_of_a_few_pieces(tmp_path, number, tensors, hashes):
    peak, planned = peak_of(tmp_path, number, tensors, hashes)
    # Code and threads' stacks are in the peak, and no pieces.
    assert peak < 24e6
    assert planned < 30e6
    assert peak < planned + 12e6


def test_checkpoints_of_one_layout_share_one_description(tmp_path):
    arrays = {"a": np.zeros((2, 3), "f4"), "b": np.zeros(4, "f2")}
    for n in range(2):
        write(tmp_path / f"{n}.safetensors", arrays, {"n": str(n)})
    write(tmp_path / "other.safetensors", {"a": arrays["a"]}, {})
    with (
        closing(open_checkpoint(tmp_path / "0.safetensors")) as first,
        closing(open_checkpoint(tmp_path / "1.safetensors")) as same,
        closing(open_checkpoint(tmp_path / "other.safetensors")) as other,
    ):
        same.share_with(first)
        assert same.tensors is first.tensors
        before = other.tensors
        other.share_with(first)
        assert other.tensors is before


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_KEPT_OPEN", reading._kept + 3)
    paths = [tmp_path / f"{n}.safetensors" for n in range(12)]
    for n, path in enumerate(paths):
        write(path, {"w": np.full(5, n, "f4")}, {})
    kept = reading._kept
    average(paths, tmp_path / "out.safetensors")
    assert reading._kept == kept
    with closing(open_checkpoint(tmp_path / "out.safetensors")) as found:
        assert found.tensors["w"].shape == (5,)
    # A file that is opened anew has to be the one that was described.
    opened = [open_checkpoint(path) for path in paths]
    try:
        write(paths[-1], {"w": np.full(5, 99, "f4")}, {})
        with pytest.raises(StateError, match=r"11\.safetensors was changed while it was read"):
            opened[-1].read(first_of(opened[-1]))
        np.testing.assert_array_equal(opened[0].read(first_of(opened[0])), np.zeros(5, "f4"))
    finally:
        for checkpoint in opened:
            checkpoint.close()
    assert reading._kept == kept


def first_of(checkpoint):
    from swa_core.checkpoints.tensors import Piece

    (name, spec), *_ = checkpoint.tensors.items()
    return Piece(name, 0, spec.elements)


@pytest.mark.parametrize("has_preadv", [True, False])
def test_files_are_read_in_as_many_calls_as_it_takes(tmp_path, monkeypatch, has_preadv):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    if has_preadv:
        whole = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, into, place: whole(fd, [into[0][:7]], place))
    else:
        monkeypatch.delattr(os, "preadv")
    file = reading.RandomFile(path)
    into = bytearray(60)
    assert file.read_into(memoryview(into), 30)
    assert into == bytes(range(30, 90))
    assert not file.read_into(memoryview(into), 60)  # 40 are left
    file.close()
    file.close()


def test_a_budget_is_kept_before_anything_is_allocated(tmp_path, capsys):
    paths = [hollow(tmp_path / f"{n}.safetensors", {"w": ["F32", [1 << 22]]}) for n in range(2)]
    out = tmp_path / "out.safetensors"
    plan = average(paths, out, dry_run=True)
    assert 1e6 < plan.memory < 30e6
    with pytest.raises(StateError, match=f"averaging 2 checkpoints takes .* {plan.memory - 1} "):
        average(paths, out, memory=plan.memory - 1)
    with pytest.raises(ValueError, match="number of bytes"):
        average(paths, out, memory=0)
    assert not out.exists()
    average(paths, out, memory=plan.memory)
    arguments = ["average", *map(str, paths), "-o", str(out), "--force", "--memory"]
    assert main([*arguments, "1MB"]) == 1
    assert "1000000 that are allowed" in capsys.readouterr().err
    assert main([*arguments, "200MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == plan.memory
    assert main([*arguments, "200MB", "--dry-run"]) == 0
    assert "MB of memory at the most" in capsys.readouterr().out


def test_a_header_that_unfolds_beyond_the_budget_is_not_parsed(tmp_path):
    text = b'{"a":[' + b"[]," * 100_000 + b"1]}"
    path = Path(tmp_path, "a.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(StateError, match=r"the header of a\.safetensors takes \d+ bytes of memory"):
        average([path], tmp_path / "out", memory=5_000_000)


def test_claims_add_up_and_end_with_the_block():
    memory_budget.claim(10**15, "nobody asks")
    with memory_budget.limited_to(100) as budget:
        memory_budget.claim(60, "one")
        memory_budget.check(40, "another")
        with pytest.raises(StateError, match="two takes 50 bytes of memory, and 40 of the 100"):
            memory_budget.claim(50, "two")
        assert budget.claimed == 60
    memory_budget.check(10**15, "nobody asks again")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1000", 1000), ("500MB", 5 * 10**8), ("2 GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("1kB", 1000)],
)
def test_sizes(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "5XB", "MB", "1e9", "0.1B"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        size(text)
