"""``swa average`` on what torch.save has written."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch

from swa_core import StateError, StructureError
from swa_core.checkpoints import average, open_checkpoint
from swa_core.cli import main
from swa_torch import checkpoints


def state(seed, **more):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
    held = model.state_dict()
    held["half"] = torch.randn(7).bfloat16()
    held["turned"] = torch.randn(3, 5).t()
    held["complex"] = torch.randn(3, dtype=torch.complex64)
    held["empty"] = torch.zeros(0, 2)
    held["tied"] = held["0.weight"]
    held.update(more)
    return held


def save(path, content, **how):
    torch.save(content, path, **how)
    return path


def test_it_is_the_mean_in_the_form_of_the_first(tmp_path):
    states = [state(n) for n in range(3)]
    paths = [save(tmp_path / f"{n}.pt", s) for n, s in enumerate(states)]
    plan = average(paths, tmp_path / "out.pt", weights=[1, 2, 1])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert isinstance(found, collections.OrderedDict)
    assert [*found] == [*states[0]]
    for name, tensor in found.items():
        first = states[0][name]
        assert (tensor.dtype, tensor.shape) == (first.dtype, first.shape)
        wide = torch.complex128 if first.is_complex() else torch.float64
        parts = [s[name].to(wide) * w / 4 for s, w in zip(states, (1, 2, 1), strict=True)]
        atol = 2e-2 if name == "half" else 1e-6
        torch.testing.assert_close(tensor.to(wide), sum(parts), rtol=0, atol=atol)
    # Tied weights are averaged once, and stay tied.
    assert "tied" not in plan.tensors
    assert found["tied"].data_ptr() == found["0.weight"].data_ptr()


def test_a_part_of_a_larger_checkpoint(tmp_path, capsys):
    paths = [
        save(tmp_path / f"{n}.ckpt", {"epoch": n, "model": {"ema": state(n)}, "lr": [0.1]})
        for n in range(2)
    ]
    with pytest.raises(StateError, match=r"no state dict.*\n.*'epoch' \(int\), 'model' \(dict\)"):
        average(paths, tmp_path / "out.ckpt")
    with pytest.raises(StateError, match=r"no part 'model\.x'"):
        average(paths, tmp_path / "out.ckpt", key="model.x")
    arguments = ["average", *map(str, paths), "-o", str(tmp_path / "out.ckpt")]
    assert main([*arguments, "--key", "model.ema", "--quiet"]) == 0
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    expected = (state(0)["0.bias"] + state(1)["0.bias"]) / 2
    torch.testing.assert_close(found["0.bias"], expected)


def test_old_files_are_read_too(tmp_path):
    old = save(tmp_path / "old.pth", state(0), _use_new_zipfile_serialization=False)
    average([old, save(tmp_path / "new.pth", state(0))], tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in state(0).items())


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    save(tmp_path / "evil.pt", {"w": Evil()})
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(StateError, match=rf"cannot read {name}"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**12), "claims 1000000000000 numbers, and 4 bytes"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2).to(torch.float8_e5m2), "torch.float8_e5m2"),
        (torch.empty(2, device="meta"), "it has no values"),
    ],
)
def test_tensors_that_cannot_be_averaged_are_refused(tmp_path, tensor, message):
    path = save(tmp_path / "a.pt", {"w": tensor})
    with pytest.raises(StateError, match=f"'w' of a.pt: .*{message}"):
        open_checkpoint(path)


def test_damaged_files_are_refused_and_leave_nothing(tmp_path):
    path = save(tmp_path / "a.pt", state(0))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        end = rng.integers(1, len(content)) if rng.random() < 0.5 else len(content)
        damaged = bytearray(content[:end])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            average([path], tmp_path / "out.pt", hashes=False, force=True)
        except (StateError, StructureError):
            refused += 1
            assert sorted(os.listdir(tmp_path)) in (
                ["a.pt"],
                ["a.pt", "out.pt", "out.pt.provenance.json"],
            )
    assert refused > 20


def test_other_files_are_left_to_others(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert checkpoints.open_checkpoint(tmp_path / "a.txt") is None


def test_what_is_held_in_memory_is_claimed_first(tmp_path):
    content = {"w": torch.zeros(1 << 20)}
    new = save(tmp_path / "new.pt", content)
    old = save(tmp_path / "old.pt", content, _use_new_zipfile_serialization=False)
    plan = average([new], tmp_path / "out.pt", dry_run=True)
    assert plan.memory > 4 << 20
    with pytest.raises(StateError, match=r"writing out\.pt takes 4194304 bytes of memory"):
        average([new], tmp_path / "out.pt", memory=4_000_000)
    with pytest.raises(StateError, match=r"old\.pt, which is read whole, takes \d+ bytes"):
        average([old], tmp_path / "out.pt", memory=4_000_000)
    # As safetensors the result need not be held.
    plain = average([new], tmp_path / "out.safetensors", dry_run=True)
    assert plain.memory == plan.memory - (4 << 20)
