"""The SHA-256 in the provenance are those of the files, however these were read."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest

from swa_core import StateError
from swa_core.checkpoints import average, digests, open_checkpoint
from swa_core.checkpoints.tensors import Piece
from swa_core.safetensors_files import packed, write


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("swa_core.checkpoints.averaging.PIECE", 1000)


def state(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(73, 91)).astype("f4"),
        "steps": np.arange(3000),
        "half": rng.normal(size=1501).astype("f2"),
        "empty": np.zeros((0, 3), "f4"),
    }


def saved(folder, number=5):
    paths = [folder / f"{n}.safetensors" for n in range(number)]
    for n, path in enumerate(paths):
        write(path, state(n), {"n": str(n)})
    return paths


def hashes_of(out):
    said = json.loads(out.with_name(out.name + ".provenance.json").read_text())
    return [entry["files"] for entry in said["inputs"]]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def read_again(monkeypatch):
    """The files that were read once more to be hashed."""
    found = []
    of_file = digests.Digests._of_file

    def noted(self, path):
        found.append(path.name)
        return of_file(self, path)

    monkeypatch.setattr(digests.Digests, "_of_file", noted)
    return found


@pytest.mark.parametrize("integers", ["equal", "first", "last"])
def test_files_are_hashed_while_they_are_read(tmp_path, read_again, integers):
    paths, out = saved(tmp_path), tmp_path / "out.safetensors"
    seen = []
    plan = average(paths, out, integers=integers, progress=lambda *figures: seen.append(figures))
    assert hashes_of(out) == [{path.name: sha256(path)} for path in paths]
    assert read_again == []
    assert seen[-1] == (plan.bytes_read, plan.bytes_read)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_without_hashes_there_are_none(tmp_path):
    paths, out = saved(tmp_path, 2), tmp_path / "out.safetensors"
    average(paths, out, hashes=False)
    assert hashes_of(out) == [{path.name: None} for path in paths]


def turned(path):
    """The same tensors in another order."""
    arrays = {name: state(1)[name] for name in ("half", "steps", "empty", "w")}
    header, place = {}, 0
    for name, array in arrays.items():
        kind = {"f4": "F32", "f2": "F16", "i8": "I64"}[array.dtype.str[1:]]
        ends = [place, place + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": ends}
        place = ends[1]
    path.write_bytes(packed(header) + b"".join(array.tobytes() for array in arrays.values()))


def test_what_is_not_read_in_order_is_read_once_more(tmp_path, read_again):
    paths, out = saved(tmp_path), tmp_path / "out.safetensors"
    turned(paths[1])
    few = state(3)
    del few["half"]
    write(paths[3], few, {})
    seen = []
    plan = average(
        paths,
        out,
        weights=[1, 1, 0, 1, 1],
        allow_missing=True,
        progress=lambda *figures: seen.append(figures),
    )
    assert hashes_of(out) == [{path.name: sha256(path)} for path in paths]
    assert sorted(read_again) == ["1.safetensors", "2.safetensors", "3.safetensors"]
    more = sum(paths[n].stat().st_size for n in (1, 2, 3))
    assert seen[-1] == (plan.bytes_read + more,) * 2


def test_shards_and_other_formats(tmp_path, read_again):
    folders = []
    for n in range(3):
        folder = tmp_path / f"folder-{n}"
        folder.mkdir()
        arrays = state(n)
        shards = {"a": ["w", "empty"], "b": ["half"], "c": ["steps"]}
        for shard, names in shards.items():
            write(folder / f"{shard}.safetensors", {name: arrays[name] for name in names}, {})
        index = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        folders.append(folder)
    average(folders, tmp_path / "out")
    expected = [
        {f"{s}.safetensors": sha256(f / f"{s}.safetensors") for s in "abc"} for f in folders
    ]
    assert hashes_of(tmp_path / "out") == expected
    assert read_again == []
    paths = [tmp_path / f"{n}.npz" for n in range(3)]
    for n, path in enumerate(paths):
        np.savez(path, **state(n))
    average(paths, tmp_path / "out.npz")
    assert hashes_of(tmp_path / "out.npz") == [{path.name: sha256(path)} for path in paths]
    assert sorted(read_again) == ["0.npz", "1.npz", "2.npz"]


def test_an_error_in_one_thread_lets_no_other_wait(tmp_path):
    paths = saved(tmp_path)
    bad = state(2)
    bad["w"][40, 3] = np.nan
    write(paths[2], bad, {})
    before = sorted(tmp_path.iterdir())
    running = threading.active_count()
    with pytest.raises(StateError, match=r"'w' of 2\.safetensors holds NaN or Inf"):
        average(paths, tmp_path / "out.safetensors")
    assert threading.active_count() == running
    assert sorted(tmp_path.iterdir()) == before


def test_a_piece_out_of_turn_waits_until_nobody_will_come(tmp_path):
    (path,) = saved(tmp_path, 1)
    checkpoint = open_checkpoint(path)
    try:
        found = digests.Digests([checkpoint], [*checkpoint.tensors], [True])
        piece = checkpoint.read(Piece("w", 0, 10))
        outcome = []

        def late():
            try:
                found.add(0, 1, "w", piece)
            except digests.StoppedError:
                outcome.append("stopped")

        thread = threading.Thread(target=late)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        found.stop()
        thread.join(10)
        assert outcome == ["stopped"]
        found.add(0, 0, "w", piece)  # whose turn it is goes on all the same
    finally:
        checkpoint.close()
