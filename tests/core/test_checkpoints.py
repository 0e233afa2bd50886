"""Averages of checkpoints on disk: exact, in small memory, and refused where they do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import closing, suppress

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_core import (
    EMA,
    Polynomial,
    StateError,
    StructureError,
    SWAConfig,
    SWAState,
    Uniform,
    init,
    save_average,
    update,
)
from swa_core.checkpoints import average, best, expanded, open_checkpoint, weights_of
from swa_core.checkpoints.arithmetic import narrowed, widened
from swa_core.checkpoints.boxes import boxes, common, shape_of, within
from swa_core.checkpoints.selecting import window_weights
from swa_core.checkpoints.tensors import Spec
from swa_core.cli import main
from swa_core.safetensors_files import read, write
from swa_core.schedule import Schedule

DTYPES = ["float16", "float32", "float64", "complex64", "bfloat16"]


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        write(path, arrays, {"format": "pt"})
    return path


def load(path):
    return dict(np.load(path)) if path.suffix == ".npz" else safetensors.numpy.load_file(path)


def checkpoints(folder, number=3, suffix=".safetensors", **more):
    rng = np.random.default_rng(0)
    return [
        save(
            folder / f"epoch-{place}{suffix}",
            {
                "w": rng.normal(size=(5, 7)).astype("f4"),
                "half": rng.normal(size=9).astype("f2"),
                "steps": np.int64(40),
                "empty": np.zeros((0, 3), "f4"),
                "scalar": np.float32(place),
                **more,
            },
        )
        for place in range(number)
    ]


def mean_of(arrays, weights=None, wide="f8"):
    weights = [1.0] * len(arrays) if weights is None else weights
    total = sum(
        a.astype(wide) * np.dtype(wide).type(w) for a, w in zip(arrays, weights, strict=True)
    )
    return total / np.dtype(wide).type(sum(weights))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("weights", [None, [1, 0, 2.5]])
def test_it_is_the_mean_rounded_once(tmp_path, suffix, weights):
    paths = checkpoints(tmp_path, suffix=suffix)
    out = tmp_path / f"out{suffix}"
    plan = average(paths, out, weights=weights)
    found, inputs = load(out), [load(path) for path in paths]
    assert [*found] == [*inputs[0]]
    for name, array in found.items():
        expected = mean_of([i[name] for i in inputs], weights)
        assert (array.dtype, array.shape) == (inputs[0][name].dtype, inputs[0][name].shape)
        np.testing.assert_allclose(array, expected, atol=2e-3 if name == "half" else 1e-6)
    # Of half precision the sum is wide: the mean is the nearest half-precision number.
    wide = mean_of([i["half"] for i in inputs], weights, "f4")
    np.testing.assert_array_equal(found["half"], wide.astype("f2"))
    assert (plan.averaged, plan.bytes_read) == (4, 3 * plan.bytes_written)
    assert files(tmp_path) == sorted(
        [*(p.name for p in paths), out.name, f"{out.name}.provenance.json"]
    )


@given(data=st.data())
@settings(max_examples=60)
def test_any_dtype_and_shape_against_float64(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    number = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 999))
    weights = data.draw(st.none() | st.lists(st.floats(0.125, 8), min_size=number, max_size=number))
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=shape) * 10).astype(dtype) for _ in range(number)]
    paths = [save(folder / f"{n}.safetensors", {"w": a}) for n, a in enumerate(arrays)]
    average(paths, folder / "out.safetensors", weights=weights, dtype="float64", hashes=False)
    found = load(folder / "out.safetensors")["w"]
    wide = "c16" if dtype.kind == "c" else "f8"
    expected = mean_of(arrays, weights, wide)
    assert found.dtype == dtype
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(wide), expected, rtol=eps, atol=eps)


@given(st.integers(0, 2**16 - 1), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_is_widened_and_rounded_as_its_own_library_does(bits, number):
    spec = Spec("bfloat16", (1,))
    piece = np.array([bits], np.uint16)
    np.testing.assert_array_equal(
        widened(piece, spec, np.dtype("f4")), piece.view(ml_dtypes.bfloat16).astype("f4")
    )
    with np.errstate(over="ignore"):
        theirs = np.float32([number]).astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(narrowed(np.float32([number]), spec), theirs)


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.7), Polynomial(2)])
def test_weights_of_a_rule_give_the_running_average(rule):
    weights = [{"w": np.float64([n**2, -n])} for n in range(1, 9)]
    state = init(weights[0])
    for w in weights:
        state = update(state, w, Schedule(1, 1), rule)
    expected = np.average([w["w"] for w in weights], 0, weights_of(rule, 8))
    np.testing.assert_allclose(state.average["w"], expected, rtol=1e-12)


def shards(folder):
    folder.mkdir()
    rng = np.random.default_rng(hash(folder.name) % 999)
    parts = {
        "model-1-of-2.safetensors": {"a": rng.normal(size=300_000).astype("f4")},
        "model-2-of-2.safetensors": {
            "b": rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16),
            "c": np.ones(3, "f4"),
        },
    }
    for name, arrays in parts.items():
        write(folder / name, arrays, {"format": "pt"})
    names = {tensor: name for name, arrays in parts.items() for tensor in arrays}
    index = {"metadata": {"total_size": 1200044}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(f'"{folder.name}"')
    return folder


def test_shards_keep_their_layout_and_their_side_files(tmp_path):
    paths = [shards(tmp_path / name) for name in ("one", "two", "three")]
    out = tmp_path / "out"
    average(paths, out)
    assert files(out) == files(paths[0])
    assert (out / "config.json").read_text() == '"one"'
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        inputs = [load(path / name) for path in paths]
        for tensor, array in load(out / name).items():
            wide = np.mean([i[tensor].astype("f4") for i in inputs], 0, dtype="f4")
            np.testing.assert_allclose(
                array.astype("f4"), wide, rtol=1e-2 if tensor == "b" else 1e-6
            )
    with closing(open_checkpoint(out / "model.safetensors.index.json")) as opened:
        assert opened.tensors["a"].shape == (300_000,)
    # The folder is replaced only when asked for.
    before = load(out / name)["b"]
    with pytest.raises(FileExistsError, match="force"):
        average(paths[:1], out)
    average(paths[:1], out, force=True)
    assert not np.array_equal(load(out / name)["b"], before)
    assert files(tmp_path / "out") == files(paths[0])
    with pytest.raises(FileExistsError, match="one of the checkpoints"):
        average(paths, paths[1], force=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update(a="../secret"), "outside of its folder"),
        (lambda i: i["weight_map"].update(a="/etc/hostname"), "outside of its folder"),
        (lambda i: i["weight_map"].update(a="link"), "outside of its folder"),
        (lambda i: i["weight_map"].update(a="circle"), "outside of its folder"),
        (lambda i: i["weight_map"].update(a="a\0b"), "outside of its folder"),
        (lambda i: i["weight_map"].update(a="\ud800"), "outside of its folder"),
        (lambda i: i["weight_map"].update(z="model-1-of-2.safetensors"), "disagree on tensor 'z'"),
        (lambda i: i["weight_map"].pop("b"), "disagree on tensor 'b'"),
        (lambda i: i.pop("weight_map"), "no index"),
        (lambda i: i.update(weight_map={}), "names no tensor"),
        (lambda i: i.update(weight_map=[1]), "does not name a file"),
    ],
)
def test_an_index_that_is_wrong_or_leads_outside_is_refused(tmp_path, change, message):
    folder = shards(tmp_path / "one")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to("circle")
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    change(said)
    index.write_text(json.dumps(said))
    with pytest.raises(StateError, match=message):
        open_checkpoint(folder)


def test_metadata_stay_but_what_was_true_of_a_running_average_alone(tmp_path):
    average_ = {"w": np.ones(2, "f4")}
    for n in (1, 2):
        save_average(tmp_path / f"{n}.safetensors", SWAState(n, n, 0, n, average_), SWAConfig())
    average(sorted(tmp_path.glob("*.safetensors")), tmp_path / "out.safetensors")
    assert read(tmp_path / "out.safetensors")[1] == {"format": "pt"}


def test_provenance(tmp_path):
    paths = checkpoints(tmp_path, 2)
    average(paths, tmp_path / "out.safetensors", weights=[1, 3])
    said = json.loads((tmp_path / "out.safetensors.provenance.json").read_text())
    assert [entry["weight"] for entry in said["inputs"]] == [1, 3]
    sha = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    assert said["inputs"][1]["files"] == {"epoch-1.safetensors": sha}
    assert said["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_memory_does_not_grow_with_checkpoints(tmp_path, suffix):
    size = 4_000_000  # 16 MB each
    for n in range(4):
        save(tmp_path / f"{n}{suffix}", {"w": np.full(size, n, "f4")})
    paths = sorted(tmp_path.glob(f"*{suffix}"))
    tracemalloc.start()
    try:
        average(paths, tmp_path / f"out{suffix}", hashes=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14e6
    np.testing.assert_array_equal(load(tmp_path / f"out{suffix}")["w"], np.full(size, 1.5, "f4"))


def refused(kind, message, paths, tmp_path, **arguments):
    before = files(tmp_path)
    with pytest.raises(kind, match=message):
        average(paths, tmp_path / "out.safetensors", **arguments)
    assert files(tmp_path) == before


def test_tensors_that_differ_are_refused_and_shown(tmp_path):
    paths = checkpoints(tmp_path)
    for change, message in (
        ({"more": np.ones(2, "f4")}, "epoch-0.safetensors lacks 'more'"),
        ({"w": np.ones((7, 5), "f4")}, r"'w' is float32 of shape \(5, 7\) in epoch-0.*\(7, 5\) in"),
        ({"w": np.ones((5, 7), "f8")}, "and float64 of shape"),
        ({"steps": np.int64(41)}, "'steps' of int64 differs between epoch-0.* and epoch-2"),
        ({"w": np.full((5, 7), np.nan, "f4")}, "'w' of epoch-2.safetensors holds NaN or Inf"),
        ({"half": np.full(9, np.inf, "f2")}, "'half' of epoch-2.safetensors holds NaN or Inf"),
    ):
        bad = tmp_path / "epoch-2.safetensors"
        save(bad, {**load(paths[0]), **change})
        kind = StructureError if "shape" in message or "lacks" in message else StateError
        refused(kind, message, paths, tmp_path)
    save(bad, {name: a for name, a in load(paths[0]).items() if name != "w"})
    refused(StructureError, "epoch-2.safetensors lacks 'w'", paths, tmp_path)
    average(paths, tmp_path / "out.safetensors", allow_missing=True)
    expected = (load(paths[0])["w"] + load(paths[1])["w"]) / 2
    np.testing.assert_array_equal(load(tmp_path / "out.safetensors")["w"], expected)


@pytest.mark.parametrize(("integers", "expected"), [("first", 1), ("last", 3)])
def test_whole_numbers_of_one_checkpoint_may_be_taken(tmp_path, integers, expected):
    paths = [save(tmp_path / f"{n}.safetensors", {"steps": np.int32(n)}) for n in (1, 2, 3)]
    refused(StateError, "whole numbers are not averaged", paths, tmp_path)
    average(paths, tmp_path / "out.safetensors", integers=integers)
    assert load(tmp_path / "out.safetensors")["steps"] == expected


def test_a_sum_that_overflows_says_what_to_do(tmp_path):
    paths = [save(tmp_path / f"{n}.safetensors", {"w": np.float32([3e38])}) for n in (1, 2)]
    refused(StateError, "overflows float32", paths, tmp_path)
    average(paths, tmp_path / "out.safetensors", dtype="float64")
    assert load(tmp_path / "out.safetensors")["w"] == np.float32(3e38)


def test_wrong_arguments(tmp_path):
    paths = checkpoints(tmp_path, 2)
    refused(ValueError, "no checkpoints", [], tmp_path)
    refused(ValueError, "3 weights were given for 2", paths, tmp_path, weights=[1, 2, 3])
    refused(ValueError, "sum above 0", paths, tmp_path, weights=[0, 0])
    refused(ValueError, "sum above 0", paths, tmp_path, weights=[1, float("nan")])
    refused(ValueError, "dtype", paths, tmp_path, dtype="float16")
    refused(ValueError, "integers", paths, tmp_path, integers="mean")
    refused(FileNotFoundError, "no checkpoint", [*paths, tmp_path / "none"], tmp_path)
    (tmp_path / "x.txt").write_text("x")
    refused(StateError, r"x\.txt is no checkpoint of a kind", [tmp_path / "x.txt"], tmp_path)


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("a.pt", "torch", "torch"),
        ("a/.metadata", "torch", "torch"),
        ("a.keras", "keras", "keras"),
        ("a/_METADATA", "jax", "orbax"),
    ],
)
def test_a_reader_that_is_not_installed_says_what_to_install(tmp_path, name, missing, extra):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    # As where the package is not there.
    script = f"import sys; sys.modules[{missing!r}] = None; from swa_core.cli import main; "
    script += "sys.exit(main(sys.argv[1:]))"
    target = path.parent if path.parent.name == "a" else path
    command = [sys.executable, "-c", script, "inspect", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"swa inspect: cannot read {target.name}: import of {missing}")
    assert done.stderr.endswith(f'Hint: pip install "swa-core[{extra}]"\n')


def test_the_result_may_be_one_file_of_safetensors(tmp_path):
    paths = checkpoints(tmp_path, suffix=".npz")
    average(paths, tmp_path / "out.safetensors")
    found, inputs = load(tmp_path / "out.safetensors"), [load(path) for path in paths]
    assert {name: array.dtype for name, array in found.items()} == {
        name: array.dtype for name, array in inputs[0].items()
    }
    np.testing.assert_allclose(found["w"], mean_of([i["w"] for i in inputs]), atol=1e-6)
    assert read(tmp_path / "out.safetensors")[1] == {"format": "pt"}
    average([shards(tmp_path / "one")], tmp_path / "whole.safetensors")
    assert sorted(load(tmp_path / "whole.safetensors")) == ["a", "b", "c"]


@given(data=st.data())
@settings(max_examples=100)
def test_boxes_of_a_stretch_are_all_of_it_in_order(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    begin = data.draw(st.integers(0, whole.size))
    end = data.draw(st.integers(begin, whole.size))
    found = [*boxes(shape, begin, end)]
    for start, box in found:
        assert shape_of(box) == whole[box].shape
        assert whole[box].reshape(-1)[0] == start
    parts = [whole[box].reshape(-1) for _, box in found]
    np.testing.assert_array_equal(np.concatenate([*parts, []]), np.arange(begin, end))
    # Cut with any other box, each is a stretch of that.
    ends = [data.draw(st.integers(1, max(1, size))) for size in shape]
    other = tuple(slice(data.draw(st.integers(0, stop - 1)), stop) for stop in ends)
    inner = np.arange(np.prod(shape_of(other), dtype=int)).reshape(shape_of(other))
    for _, box in found:
        if whole.size and (both := common(box, other)) is not None:
            part = inner[within(both, other)].reshape(-1)
            np.testing.assert_array_equal(part, np.arange(part[0], part[0] + part.size))
            np.testing.assert_array_equal(whole[both], whole[box][within(both, box)])


def test_npz_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    refused(StateError, r"a\.npz: it is no npz file", [tmp_path / "a.npz"], tmp_path)
    pickled = tmp_path / "b.npz"
    np.savez(pickled, w=np.array([object()], dtype=object))
    refused(StateError, "'w' of b.npz: it has dtype object", [pickled], tmp_path)
    head = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    bomb = head + struct.pack("<H", len(text)) + text + bytes(8)
    refused(
        StateError, "cannot take 8 bytes", [zipped(tmp_path / "c.npz", **{"w.npy": bomb})], tmp_path
    )
    refused(StateError, "'x' is no array", [zipped(tmp_path / "d.npz", x=b"")], tmp_path)
    np.savez(tmp_path / "e.npz", w=np.asfortranarray(np.ones((2, 3))))
    refused(StateError, "column by column", [tmp_path / "e.npz"], tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_checkpoint_is_an_error_or_another_checkpoint(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.mktemp("damaged")
    paths = checkpoints(folder, 2, suffix)
    content = bytearray(paths[1].read_bytes())
    if data.draw(st.booleans(), "truncated"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3), "flips") if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    paths[1].write_bytes(content)
    before = files(folder)
    with suppress(StateError, StructureError):
        average(paths, folder / f"out{suffix}", hashes=False)
        return
    assert files(folder) == before


def test_patterns_are_sorted_as_people_count(tmp_path):
    for n in (1, 2, 10, 9):
        (tmp_path / f"step-{n}.npz").touch()
    found = expanded([f"{tmp_path}/step-*.npz", f"{tmp_path}/step-1.npz"])
    assert [path.name for path in found] == [f"step-{n}.npz" for n in (1, 2, 9, 10)]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint matches .*\.x"):
        expanded([f"{tmp_path}/*.x"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", '{"a.npz": {"loss": 3}, "b.npz": {"loss": 1}, "c.npz": {"loss": 2}}'),
        ("m.json", '[{"checkpoint": "%s/a.npz", "loss": 3}, {"checkpoint": "b.npz", "loss": 1},'
                   ' {"checkpoint": "c.npz", "loss": 2}]'),
        ("m.csv", "checkpoint,loss\na.npz,3\nb.npz,1\nc.npz,2\n"),
    ],
)  # fmt: skip
def test_the_best_by_a_metric(tmp_path, name, text):
    metrics = tmp_path / name
    metrics.write_text(text.replace("%s", str(tmp_path)))
    paths = [tmp_path / f"{letter}.npz" for letter in "abc"]
    chosen = best(paths, 2, metrics, by="loss", mode="min")
    assert [path.name for path in chosen] == ["b.npz", "c.npz"]
    chosen = best(paths, 2, metrics, by="loss", mode="max")
    assert [path.name for path in chosen] == ["a.npz", "c.npz"]
    with pytest.raises(StateError, match=r"no 'accuracy' of a\.npz"):
        best(paths, 1, metrics, by="accuracy", mode="max")
    with pytest.raises(StateError, match="best 4 of 3"):
        best(paths, 4, metrics, by="loss", mode="min")


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"a.npz": 1}', '{"a.npz": {"loss": "x"}}'])
def test_metrics_that_are_none(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(StateError, match="holds no metrics"):
        best([tmp_path / "a.npz"], 1, tmp_path / "m.json", by="loss", mode="min")


# The command


def command(capsys, *arguments):
    status = main(["average", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_averages_the_last_of_a_pattern(tmp_path, capsys):
    paths = checkpoints(tmp_path, 11)
    out = tmp_path / "out.safetensors"
    pattern = tmp_path / "epoch-*.safetensors"
    status, said, err = command(capsys, pattern, "--last", 3, "-o", out, "--rule", "ema(0.5)")
    assert (status, err) == (0, "")
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["14.29%", "28.57%", "57.14%"]
    assert [line.split()[1] for line in lines[:3]] == [str(path) for path in paths[-3:]]
    assert lines[3].startswith("4 tensors averaged, 1 tensor of whole numbers taken over")
    np.testing.assert_allclose(load(out)["scalar"], (8 + 2 * 9 + 4 * 10) / 7, rtol=1e-6)
    status, said, err = command(capsys, pattern, "-o", out)
    assert (status, said) == (1, "")
    assert err == f"swa average: {out} is there already; force (--force) replaces it\n"
    assert command(capsys, pattern, "-o", out, "--force", "--quiet") == (0, "", "")
    np.testing.assert_allclose(load(out)["scalar"], 5)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    paths = checkpoints(tmp_path, 2)
    before = files(tmp_path)
    status, said, _ = command(
        capsys, *paths, "-o", tmp_path / "out.safetensors", "--dry-run", "--json"
    )
    figures = json.loads(said)
    assert status == 0
    assert (figures["written"], figures["averaged"], figures["weights"]) == (False, 4, [1, 1])
    assert files(tmp_path) == before
    said = command(capsys, *paths, "-o", tmp_path / "out.safetensors", "--dry-run")[1]
    assert "would be averaged" in said


def test_a_damaged_checkpoint_is_no_wrong_usage(tmp_path, capsys):
    paths = checkpoints(tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    status, said, err = command(capsys, *paths, "-o", tmp_path / "out.safetensors")
    assert (status, said) == (1, "")
    assert err.startswith("swa average: cannot read epoch-1.safetensors")


def test_the_command_takes_the_best(tmp_path, capsys):
    paths = checkpoints(tmp_path, 3)
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({p.name: {"loss": -n} for n, p in enumerate(paths)}))
    out = tmp_path / "out.safetensors"
    which = ["--best", "2", "--by", metrics, "--metric", "loss", "--mode", "min"]
    assert command(capsys, *paths, "-o", out, "--quiet", *which) == (0, "", "")
    np.testing.assert_allclose(load(out)["scalar"], 1.5)


def test_an_error_of_a_checkpoint_exits_with_1(tmp_path, capsys):
    paths = checkpoints(tmp_path, 2)
    save(paths[1], {"w": np.ones(2, "f4")})
    status, said, err = command(capsys, *paths, "-o", tmp_path / "out.safetensors")
    assert (status, said) == (1, "")
    assert err.startswith("swa average: the checkpoints have not the same tensors")


def test_a_window_out_of_two_running_averages(tmp_path, capsys):
    weights = [{"w": np.float32([n**3 % 17, n])} for n in range(40)]
    state, paths = init(weights[0]), {}
    for n, w in enumerate(weights, start=1):
        state = update(state, w, Schedule(1, 1), Uniform())
        if n in (10, 40):
            paths[n] = tmp_path / f"{n}.safetensors"
            save_average(paths[n], state, SWAConfig())
    out = tmp_path / "out.safetensors"
    status, _, err = command(capsys, paths[40], paths[10], "--window", "-o", out)
    assert (status, err) == (0, "")
    expected = np.mean([w["w"] for w in weights[10:]], 0)
    np.testing.assert_allclose(load(out)["w"], expected, rtol=2e-6)
    status, _, err = command(capsys, paths[10], paths[40], "--window", "-o", tmp_path / "no")
    assert status == 1
    assert "pass the later one first" in err
    save_average(tmp_path / "ema", state, SWAConfig(rule=EMA(0.5)))
    with pytest.raises(StateError, match="no uniform running average"):
        window_weights([tmp_path / "ema", paths[10]])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--best", "2"],
        ["--rule", "ema(2)"],
        ["--rule", "emma"],
        ["--rule", "ema(x)"],
        ["--rule", "uniform", "--weights", "1,2"],
        ["--weights", "1,x"],
        ["--weights", "1"],
        ["--last", "0"],
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, capsys, wrong):
    paths = checkpoints(tmp_path, 2)
    with pytest.raises(SystemExit) as exit_:
        main(["average", *map(str, paths), "-o", str(tmp_path / "out"), *wrong])
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
