"""Sums of pieces: every dtype, odd ends of pieces, and what does not fit its dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import StateError
from swa_core.checkpoints import average, sums
from swa_core.checkpoints.arithmetic import accumulator
from swa_core.checkpoints.tensors import Spec
from swa_core.safetensors_files import write

AVERAGED = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]


def drawn(dtype, size, seed=0):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=size) * 10
    if np.dtype(dtype).kind == "c":
        numbers = numbers + 1j * rng.normal(size=size)
    return numbers.astype(dtype)


def stored(array):
    """As a checkpoint hands it out."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def by_hand(arrays, weights, wide):
    """One operation after the other, in whole arrays."""
    total = arrays[0].astype(wide) * np.dtype(wide).type(weights[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total += array.astype(wide) * np.dtype(wide).type(weight)
    return (total / np.dtype(wide).type(sum(weights))).astype(arrays[0].dtype)


@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("least", ["float32", "float64"])
@pytest.mark.parametrize("is_read_into", [True, False])
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([1.0, 0.5, 3.0, -0.25]), min_size=1, max_size=4),
)
def test_every_dtype_to_the_last_bit(dtype, least, is_read_into, sizes, weights):
    if sum(weights) <= 0:
        weights = [-w for w in weights] if sum(weights) < 0 else [*weights, 1.0]
    spec, room = Spec(dtype, ()), sums.Room()
    wide = accumulator(spec, least)
    for size in sizes:  # in the same memory, which the last sum has left full
        arrays = [drawn(dtype, size, seed) for seed in range(len(weights))]
        total = sums.sum_of(spec, wide, size, room)
        for array, weight in zip(arrays, weights, strict=True):
            piece = stored(array)
            before = piece.copy()
            if is_read_into:
                space = total.space()
                assert (space.dtype, space.shape) == (spec.storage, (size,))
                space[:] = piece
                total.add(space, weight)
            else:
                piece.flags.writeable = False
                total.add(piece, weight)
                np.testing.assert_array_equal(piece, before)
        mean = total.mean()
        kept = mean.copy()
        expected = stored(by_hand(arrays, weights, wide))
        np.testing.assert_array_equal(mean, expected)
        assert mean.dtype == spec.storage
        # The result is the caller's: what is summed next does not touch it.
        after = sums.sum_of(spec, wide, size, room)
        after.add(stored(drawn(dtype, size, 99)), 2.0)
        after.mean()
        np.testing.assert_array_equal(mean, kept)


def test_half_a_word_that_is_over_counts_for_nothing():
    room = sums.Room()
    for use in ("read", "wide", "total"):
        room.array(use, 64, np.uint8)[:] = 0xFF  # NaN
    total = sums.sum_of(Spec("bfloat16", (3,)), np.dtype("f4"), 3, room)
    total.add(np.uint16([0x3F80, 0, 0x4000]), 1.0)
    np.testing.assert_array_equal(total.mean(), np.uint16([0x3F80, 0, 0x4000]))


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        write(path, arrays, {})
    return path


@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("size", [63, 64, 65, 128, 191])
def test_ends_of_pieces_are_no_ends_of_tensors(tmp_path, monkeypatch, dtype, size):
    monkeypatch.setattr("swa_core.checkpoints.averaging.PIECE", 64)
    suffix = ".npz" if dtype == "complex128" else ".safetensors"
    states = [
        {
            "first": drawn(dtype, 3, n),
            "w": drawn(dtype, size, n + 10),
            "empty": np.zeros((0, 5), dtype),
            "scalar": drawn(dtype, (), n + 20),
            "last": drawn(dtype, (7, 11), n + 30),
        }
        for n in range(3)
    ]
    paths = [save(tmp_path / f"{n}{suffix}", **state) for n, state in enumerate(states)]
    average(paths, tmp_path / f"out{suffix}")
    found = loaded(tmp_path / f"out{suffix}")
    wide = accumulator(Spec(dtype, ()), "float32")
    for name, array in found.items():
        expected = by_hand([state[name] for state in states], [1.0] * 3, wide)
        assert array.shape == expected.shape
        np.testing.assert_array_equal(array, expected)


def loaded(path):
    if path.suffix == ".npz":
        return dict(np.load(path))
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("integers", ["equal", "first", "last"])
def test_whole_numbers_over_many_pieces(tmp_path, monkeypatch, dtype, integers):
    monkeypatch.setattr("swa_core.checkpoints.averaging.PIECE", 4)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 2, 11).astype(dtype) for _ in range(3)]
    if integers == "equal":
        arrays = arrays[:1] * 3
    paths = [save(tmp_path / f"{n}.safetensors", w=a) for n, a in enumerate(arrays)]
    average(paths, tmp_path / "out.safetensors", integers=integers)
    found = loaded(tmp_path / "out.safetensors")["w"]
    np.testing.assert_array_equal(found, arrays[-1 if integers == "last" else 0])
    arrays[1][-1] = not arrays[1][-1]
    save(paths[1], w=arrays[1])
    with pytest.raises(StateError, match=r"'w' of \w+ differs between 0.* and 1\."):
        average([paths[0], paths[1]], tmp_path / "not")


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("float16", 65504), ("bfloat16", ml_dtypes.finfo("bfloat16").max), ("float32", 3.4e38)],
)
def test_a_mean_that_is_too_large_for_its_dtype_is_refused(tmp_path, dtype, largest):
    """Half precision holds less than its sum; with negative weights a mean may be too large."""
    numbers = [np.array([1.0, largest, largest]), np.array([1.0, -largest, largest])]
    paths = [
        save(tmp_path / f"{n}.safetensors", w=array.astype(dtype))
        for n, array in enumerate(numbers)
    ]
    average(paths, tmp_path / "out.safetensors", dtype="float64")  # 0 and the largest
    assert loaded(tmp_path / "out.safetensors")["w"][2] == numbers[0].astype(dtype)[2]
    with pytest.raises(StateError, match=rf"mean of tensor 'w' is too large for {dtype}"):
        average(paths, tmp_path / "not.safetensors", weights=[2, -1], dtype="float64")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
@pytest.mark.parametrize("place", [0, 1, 6])
def test_infinity_and_nan_in_either_half_of_a_word(tmp_path, bits, place):
    arrays = [np.zeros(7, np.uint16), np.zeros(7, np.uint16)]
    arrays[1][place] = bits
    paths = [
        save(tmp_path / f"{n}.safetensors", w=array.view(ml_dtypes.bfloat16))
        for n, array in enumerate(arrays)
    ]
    with pytest.raises(StateError, match=r"'w' of 1\.safetensors holds NaN or Inf"):
        average(paths, tmp_path / "out.safetensors")


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    path = save(tmp_path / "a.safetensors", w=np.zeros(4, np.int8))
    path.write_bytes(path.read_bytes().replace(b'"I8"', b'"F8_E4M3"').replace(b" " * 7, b"", 1))
    content = path.read_bytes()
    length = content.index(b"}}") + 2 - 8
    path.write_bytes(length.to_bytes(8, "little") + content[8 : 8 + length] + bytes(4))
    with pytest.raises(StateError, match=r"a\.safetensors: array 'w' has dtype 'F8_E4M3'"):
        average([path], tmp_path / "out.safetensors")
