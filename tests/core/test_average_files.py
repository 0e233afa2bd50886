"""Averages as safetensors files: complete, read by others, and refused when damaged."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import subprocess
import sys
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swa_core import (
    EMA,
    Schedule,
    StateError,
    StructureError,
    SWAConfig,
    SWAState,
    load_average,
    save_average,
)
from swa_core.atomic import replacing
from swa_core.safetensors_files import read, write

CONFIG = SWAConfig(start="10step", every="4step", rule=EMA(0.9))
AVERAGE = {
    "dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3)},
    "steps": None,
    "scale": [np.float32(2.5), np.zeros((0, 4), np.float32)],
    "phases": np.array([1 + 2j, -3j], np.complex128),
    "narrow": np.array([1 - 1j], np.complex64),
}
STATE = SWAState(n_updates=21, n_averaged=3, n_skipped=1, total=2.71, average=AVERAGE)


def saved(tmp_path, **more):
    file = tmp_path / "average.safetensors"
    save_average(file, STATE, CONFIG, **more)
    return file


def rewritten(file, change):
    """The file with its description changed."""
    arrays, metadata = read(file)
    description = json.loads(metadata["swa"])
    change(description, arrays)
    write(file, arrays, metadata | {"swa": json.dumps(description)})
    return file


def test_everything_comes_back_bit_for_bit(tmp_path):
    file = saved(
        tmp_path,
        schedule=Schedule(10, 4, 30),
        framework="keras",
        extra={"epochs": 3, "rate": 0.1 + 0.2},
        beside={"live/0": np.ones(2, np.int32)},
    )
    found = load_average(file)
    assert found.state[:4] == STATE[:4]
    assert found.config == CONFIG
    assert found.schedule == Schedule(10, 4, 30)
    assert (found.framework, found.extra) == ("keras", {"epochs": 3, "rate": 0.1 + 0.2})
    assert found.versions["numpy"] == np.__version__
    expected = {
        "dense/kernel": AVERAGE["dense"]["kernel"],
        "dense/bias": AVERAGE["dense"]["bias"],
        "scale/0": AVERAGE["scale"][0],
        "scale/1": AVERAGE["scale"][1],
        "phases": AVERAGE["phases"],
        "narrow": AVERAGE["narrow"],
    }
    assert found.state.average.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found.state.average[path], leaf, strict=True)
    np.testing.assert_array_equal(found.beside["live/0"], np.ones(2, np.int32), strict=True)


def test_a_nested_average_of_ones_own_is_restored_from_the_paths(tmp_path):
    from swa_core import state_from_dict, state_to_dict

    weights = {"a": [np.float32([1, 2])]}
    save_average(tmp_path / "a", SWAState(1, 1, 0, 1.0, weights), CONFIG)
    found = load_average(tmp_path / "a")
    state = state_from_dict(state_to_dict(found.state), weights)
    np.testing.assert_array_equal(state.average["a"][0], weights["a"][0])


def test_the_formats_own_library_reads_it(tmp_path):
    file = saved(tmp_path)
    theirs = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(theirs["dense/kernel"], AVERAGE["dense"]["kernel"])
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata()["format"] == "pt"


ANY = st.sampled_from(
    ["f2", "f4", "f8", ">f4", "i1", "i8", "u1", "u2", "u4", "?", "c8", ml_dtypes.bfloat16]
)


@given(
    arrays=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        ANY.flatmap(lambda d: hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, min_side=0)).map(
            lambda a, d=d: a.astype(d).T
        )),
        max_size=4,
    )
)  # fmt: skip
def test_any_arrays_go_both_ways_between_this_and_the_formats_own_library(tmp_path_factory, arrays):
    folder = tmp_path_factory.mktemp("files")
    write(folder / "ours", arrays, {"a": "ü"})
    ours, metadata = read(folder / "ours")
    assert metadata == {"a": "ü"}
    theirs = safetensors.numpy.load_file(folder / "ours")
    # Their writer takes contiguous arrays in the machine's own order alone.
    native = {
        name: np.ascontiguousarray(a.astype(a.dtype.newbyteorder("="))).reshape(a.shape)
        for name, a in arrays.items()
    }
    safetensors.numpy.save_file(native, folder / "theirs")
    both = read(folder / "theirs")[0]
    assert ours.keys() == theirs.keys() == both.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        for found in (ours[name], both[name]):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(theirs[name], array)


@given(data=st.data())
def test_a_damaged_file_is_an_error_or_another_file(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    file = saved(folder)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), "truncated"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    # Most of what matters stands in the header.
    places = st.integers(0, min(len(content), 1200) - 1) if content else st.nothing()
    for _ in range(data.draw(st.integers(0, 3), "flips") if content else 0):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with suppress(StateError):
        load_average(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}}, "cannot take 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "begins at byte 4"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            },
            "'b' begins at byte 0, and not at 8",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "take 4 bytes, and 8"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "has shape"),
        ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "has shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 65 + [2], "data_offsets": [0, 8]}}, "dimensions"),
        ({"a": {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}}, "'F8_E5M2', which"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not described"),
        ({"__metadata__": {"a": 1}}, "metadata are not strings"),
        ([], "no table"),
    ],
)
def test_a_header_that_claims_what_cannot_be_is_refused(tmp_path, header, message):
    text = json.dumps(header).encode()
    file = tmp_path / "bad"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(StateError, match=message):
        read(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 20, b"PK\x03\x04" + b"\0" * 40])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(StateError, match="no safetensors file"):
        load_average(tmp_path / "other")


def test_names_that_stand_twice_in_a_header_are_refused(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    text = ("{" + entry + ", " + entry + "}").encode()
    (tmp_path / "twice").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(StateError, match="stands in it twice"):
        read(tmp_path / "twice")


def test_an_average_moves_to_a_model_with_other_names(tmp_path):
    file = tmp_path / "torch"
    average = {"fc.weight": np.float32([[1, 2]]), "fc.bias": np.float32([3])}
    counts = {"fc.bias": (1, 1.0)}
    save_average(
        file, SWAState(9, 2, 0, 2.0, average), CONFIG, framework="torch", extra={"a": 1},
        beside={"b": np.ones(1)}, counts=counts,
    )  # fmt: skip
    found = load_average(file)
    assert found.counts == counts
    names = {"kernel": "fc.weight", "bias": "fc.bias"}
    moved = found.renamed(names, {"kernel": np.transpose})
    assert (moved.extra, moved.beside, moved.counts) == ({}, {}, {"bias": (1, 1.0)})
    assert [*moved.state.average] == [*names]
    np.testing.assert_array_equal(moved.state.average["kernel"], [[1], [2]])
    assert moved.state[:4] == found.state[:4]
    with pytest.raises(StructureError, match=r"'fc\.bias' joined it later"):
        found.refuse_counts()
    with pytest.raises(StructureError, match=r"'bias' is to be 'bias', which.*\n.*'fc\.bias'"):
        found.renamed({**names, "bias": "bias"})
    with pytest.raises(StructureError, match=r"no leaf takes 'fc\.bias'"):
        found.renamed({"kernel": "fc.weight"})
    with pytest.raises(StructureError, match="a transform for 'kernl'"):
        found.renamed(names, {"kernl": np.transpose})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved, arrays: saved.update(version=99), "version 99"),
        (lambda saved, arrays: saved.pop("total"), "total missing"),
        (lambda saved, arrays: saved.update(schedule=["a", 1, None]), "schedule is"),
        (lambda saved, arrays: saved.update(schedule=[1, 0, None]), "schedule is"),
        (lambda saved, arrays: saved["config"].update(evry=3), "its configuration is none"),
        (lambda saved, arrays: saved.update(config=None), "its configuration is none"),
        (lambda saved, arrays: saved.update(extra=[]), "none of an average"),
        (lambda saved, arrays: saved.update(beside=["beside/x"]), "not those it describes"),
        (lambda saved, arrays: saved.update(complex128=["narrow"]), "not those it describes"),
        (lambda saved, arrays: saved.update(counts={"narrow": 3}), "not those it describes"),
        (lambda saved, arrays: arrays.update(i=np.zeros(1, np.int8)), "'i' has dtype int8"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(StateError, match=message):
        load_average(rewritten(saved(tmp_path), change))


def test_arrays_of_somebody_else_are_no_average(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        StateError, match=r"weights\.safetensors holds arrays, but no saved average"
    ):
        load_average(tmp_path / "weights.safetensors")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    file = saved(tmp_path)
    before = file.read_bytes()
    with pytest.raises(StateError, match="no dtype float8"):
        save_average(file, STATE, CONFIG, beside={"x": np.zeros(2, ml_dtypes.float8_e5m2)})
    clash = {"beside": {"x": np.zeros(2)}}
    with pytest.raises(StructureError, match="'beside/x', which is kept"):
        save_average(file, STATE._replace(average=clash), CONFIG, beside={"x": np.zeros(2)})
    with pytest.raises(TypeError):
        save_average(file, STATE, CONFIG, extra={"model": object()})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("raised", [OSError, KeyboardInterrupt])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, raised):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with suppress(raised), replacing(target) as file:
        file.write(b"ne")
        raise raised
    assert (target.read_bytes(), os.listdir(tmp_path)) == (b"old", ["target"])
    link = tmp_path / "link"
    link.symlink_to(target)
    with replacing(link) as file:
        file.write(b"new")
    assert (target.read_bytes(), link.is_symlink()) == (b"new", True)
    assert target.stat().st_mode & 0o777 == 0o640


KILLED = """
import sys, numpy as np
from swa_core import SWAConfig, SWAState, save_average
number = 0
while True:
    number += 1
    state = SWAState(number, 1, 0, 1.0, {"w": np.full(500_000, number, np.float32)})
    save_average(sys.argv[1], state, SWAConfig())
    print(number, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path):
    file = tmp_path / "average.safetensors"
    root = pathlib.Path(__file__).parents[2]
    for number in range(1, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, file], stdout=subprocess.PIPE, cwd=root
        )
        for _ in range(number):  # somewhere in the writing of the next
            last = int(process.stdout.readline())
        process.kill()
        process.communicate()
        found = load_average(file)
        assert found.state.updates >= last
        np.testing.assert_array_equal(found.state.average["w"], found.state.updates)
