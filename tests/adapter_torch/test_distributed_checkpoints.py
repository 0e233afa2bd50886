"""``swa average`` on folders of torch.distributed.checkpoint that one process has saved.

Those of several ranks are in distributed/folder_checks.py.
"""

import io
import json
import os
import pickle
import re
import shutil
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from swa_core import StateError, StructureError
from swa_core.checkpoints import Spec, average, open_checkpoint
from swa_core.cli import main
from swa_torch import distributed_metadata, saved_tensors

# torch's own, in one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def weights(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 7, generator=generator),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "complex": torch.randn(3, generator=generator, dtype=torch.complex64),
        "turned": torch.randn(3, 5, generator=generator).t(),
        "part": torch.randn(40, generator=generator)[3:8],
        "steps": torch.tensor(40),
        "unsigned": torch.arange(3).to(torch.uint16),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(float(seed)),
        **more,
    }


def save(path, state):
    dcp.save(state, checkpoint_id=path)
    return path


def load(path, state):
    dcp.load(state, checkpoint_id=path)
    return state


def blank(state):
    """What to load a state into."""
    if isinstance(state, dict):
        return {name: blank(value) for name, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else None


def training(path, seed):
    """Weights, an optimizer's state with numbers beside tensors, and an object."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 + seed)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": seed}
    return save(path, state), state


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_is_the_mean_in_a_folder_that_torch_loads(tmp_path):
    states = [weights(seed) for seed in range(3)]
    paths = [save(tmp_path / f"step-{n}", state) for n, state in enumerate(states)]
    (paths[0] / "config.json").write_text("{}")
    plan = average(paths, tmp_path / "out", weights=[1, 2, 1], trust=True)
    found = load(tmp_path / "out", blank(states[0]))
    for name, tensor in found.items():
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        parts = [s[name].to(wide) * w / 4 for s, w in zip(states, (1, 2, 1), strict=True)]
        atol = 2e-2 if name == "half" else 1e-6
        torch.testing.assert_close(tensor.to(wide), sum(parts), rtol=0, atol=atol)
    assert (len(plan.tensors), plan.averaged) == (10, 8)
    assert files(tmp_path / "out") == [".metadata", "__0_0.distcp", "config.json"]
    said = json.loads((tmp_path / "out.provenance.json").read_text())
    assert sorted(said["inputs"][1]["files"]) == [".metadata", "__0_0.distcp"]
    # The result is a checkpoint to average like any other.
    average([tmp_path / "out"], tmp_path / "again", trust=True)
    again = load(tmp_path / "again", blank(states[0]))
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_the_state_of_an_optimizer_is_averaged_only_where_it_is_said(tmp_path, capsys):
    (one, first), (two, second) = (training(tmp_path / str(n), n) for n in range(2))
    with pytest.raises(
        StateError, match=r"an optimizer, 'optim'.\n.*--key model.*'model', 'optim'"
    ):
        average([one, two], tmp_path / "out", trust=True)
    with pytest.raises(StateError, match=r"no part 'ema'.\n.*'model'"):
        average([one, two], tmp_path / "out", trust=True, key="ema")
    arguments = ["average", str(one), str(two), "--trust", "--quiet", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--key", "model"]) == 0
    found = load(tmp_path / "out", {"model": blank(first["model"])})
    mean = (first["model"]["weight"] + second["model"]["weight"]) / 2
    torch.testing.assert_close(found["model"]["weight"], mean)
    with pytest.raises(dcp.CheckpointException):
        load(tmp_path / "out", blank(first))
    # All of it: entries that are no tensors are those of the first.
    assert main([*arguments, "--key", "*", "--force"]) == 0
    found = load(tmp_path / "out", blank(first))
    assert found["epoch"] == 0
    assert found["optim"]["param_groups"][0]["lr"] == 0.1
    moments = [state["optim"]["state"][0]["exp_avg"] for state in (first, second)]
    torch.testing.assert_close(found["optim"]["state"][0]["exp_avg"], sum(moments) / 2)
    # A part of a part.
    average([one], tmp_path / "moments", key="optim.state.0", trust=True)
    status = main(["inspect", str(tmp_path / "moments"), "--trust", "--json"])
    names = json.loads(capsys.readouterr().out)["tensors"]
    assert (status, [*names]) == (
        0,
        [f"optim.state.0.{m}" for m in ("exp_avg", "exp_avg_sq", "step")],
    )


def test_the_result_may_be_one_file_of_safetensors(tmp_path):
    paths = [
        save(
            tmp_path / f"{n}",
            {"model": {"a": torch.full((2, 3), float(n)), "b": torch.ones(3).half()}},
        )
        for n in range(3)
    ]
    average(paths, tmp_path / "out.safetensors", key="model", trust=True)
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["a"], torch.ones(2, 3))
    assert found["b"].dtype == torch.float16
    # A file of another kind, with the same names, is averaged with a folder.
    torch.save({name: tensor + 3 for name, tensor in found.items()}, tmp_path / "c.pt")
    both = [tmp_path / "c.pt", paths[2]]
    with pytest.raises(StateError, match="no part 'model'"):
        average(both, tmp_path / "d.safetensors", key="model", trust=True)
    torch.save({"model": torch.load(tmp_path / "c.pt")}, tmp_path / "c.pt")
    average(both, tmp_path / "d.safetensors", key="model", trust=True)
    found = safetensors.torch.load_file(tmp_path / "d.safetensors")
    assert torch.equal(found["a"], torch.full((2, 3), 3.0))
    save(tmp_path / "bad", {"w": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(StateError, match="'w': safetensors has no dtype complex128"):
        average([tmp_path / "bad"], tmp_path / "bad.safetensors", trust=True)
    assert not (tmp_path / "bad.safetensors").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_nothing_is_executed_trusted_or_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = save(tmp_path / "a", {"w": torch.ones(2)})
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StateError, match=r"is a pickle: reading one can run code.\n.*--trust"):
        open_checkpoint(path)
    with pytest.raises(StateError, match=r"asks for posix.mkdir, which is no part"):
        open_checkpoint(path, trust=True)
    assert main(["inspect", str(path)]) == 1
    assert "--trust" in capsys.readouterr().err
    # Nor by the entries that are no tensors, or the tensors themselves.
    path = save(tmp_path / "b", {"w": torch.ones(2), "evil": Evil()})
    average([path], tmp_path / "out", trust=True)
    content = (path / "__0_0.distcp").read_bytes()
    evil = content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nmkdir\n" + b"(" * 21)
    assert evil != content
    (path / "__0_0.distcp").write_bytes(evil)
    with pytest.raises(StateError, match=r"'w' in __0_0\.distcp is damaged"):
        open_checkpoint(path, trust=True)
    assert not (tmp_path / "evil").exists()


def changed(path, change):
    """The folder with another description."""
    said = pickle.loads((path / ".metadata").read_bytes())
    change(said)
    (path / ".metadata").write_bytes(pickle.dumps(said))


def of(said, name):
    (info,) = [info for index, info in said.storage_data.items() if index.fqn == name]
    return info


def larger(said):
    tensor = said.state_dict_metadata["w"]
    tensor.size = tensor.chunks[0].sizes = torch.Size([10**6, 10**6])


def same_place(said):
    of(said, "v").offset = of(said, "w").offset


def twice(said):
    tensor = said.state_dict_metadata["w"]
    tensor.size = torch.Size([4, 3])
    tensor.chunks.append(tensor.chunks[0])


def smaller(said):
    said.state_dict_metadata["w"].size = torch.Size([1, 3])


def gap(said):
    said.state_dict_metadata["w"].size = torch.Size([3, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (larger, r"'w' claims a chunk of shape \(1000000, 1000000\) in \d+ bytes"),
        (same_place, "two chunks lie at the same place"),
        (twice, "chunks of tensor 'w' overlap"),
        (smaller, "the chunks of tensor 'w' are not all of it"),
        (gap, "the chunks of tensor 'w' are not all of it"),
        (lambda s: setattr(of(s, "w"), "relative_path", "../x"), "outside of its folder"),
        (lambda s: setattr(of(s, "w"), "relative_path", "/etc/hostname"), "outside of its folder"),
        (lambda s: setattr(of(s, "w"), "relative_path", "link"), "outside of its folder"),
        (lambda s: setattr(of(s, "w"), "relative_path", "none"), "its file none is missing"),
        (lambda s: setattr(of(s, "w"), "relative_path", 5), "no description"),
        (lambda s: setattr(of(s, "w"), "offset", 10**9), "is too short"),
        (lambda s: setattr(of(s, "w"), "offset", -1), "no description"),
        (lambda s: setattr(of(s, "w"), "transform_descriptors", ["zstd"]), "transformed by zstd"),
        (lambda s: s.storage_data.clear(), "no description"),
        (lambda s: setattr(s, "storage_data", None), "does not say where"),
        (lambda s: setattr(s, "state_dict_metadata", 5), "no description"),
    ],
)  # fmt: skip
def test_a_description_that_is_not_true_is_refused(tmp_path, change, message):
    path = save(tmp_path / "a", {"w": torch.ones(2, 3), "v": torch.ones(2, 3)})
    (path / "link").symlink_to("/etc/hostname")
    changed(path, change)
    with pytest.raises(StateError, match=message):
        open_checkpoint(path, trust=True)


def test_a_dtype_that_is_not_averaged(tmp_path):
    path = save(tmp_path / "a", {"w": torch.zeros(2).to(torch.float8_e5m2)})
    with pytest.raises(StateError, match="'w' of a: it has dtype float8_e5m2"):
        open_checkpoint(path, trust=True)


def test_tensors_that_are_not_what_is_said_of_them(tmp_path):
    path = save(tmp_path / "a", {"w": torch.ones(2, 3), "v": torch.ones(3, 2)})

    def swap(said):
        w, v = of(said, "w"), of(said, "v")
        w.offset, v.offset = v.offset, w.offset

    changed(path, swap)
    with pytest.raises(StateError, match=r"'[wv]' in .* is damaged \(it is float32 of shape"):
        open_checkpoint(path, trust=True)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        # A stride of 0 where it was 300.
        (b"M,\x01K\x01\x86", b"K\x00K\x01\x86", "it claims 600 numbers, and 600 are there"),
        # An offset of 9.
        (b"QK\x00", b"QK\x09", "it claims 600 numbers, and 600 are there"),
        # Negative strides.
        (b"M,\x01K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "it claims 600 numbers"),
        (b"FloatStorage", b"Int" + b"Storage", "it is int32 of shape"),
        (b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem", "it asks for os.system"),
    ],
)
def test_a_description_of_a_tensor_that_claims_more(before, after, message):
    saved = io.BytesIO()
    torch.save(torch.ones(2, 300), saved)
    with tempfile.TemporaryFile() as file:
        file.write(b"before it")
        with zipfile.ZipFile(saved) as source, zipfile.ZipFile(file, "a") as target:
            for info in source.infolist():
                content = source.read(info)
                if info.filename.endswith("data.pkl"):
                    assert before in content
                    content = content.replace(before, after)
                target.writestr(info, content)
        file.flush()
        length = file.seek(0, os.SEEK_END)
        with pytest.raises(ValueError, match=message):
            saved_tensors.laid(file, 0, length, Spec("float32", (2, 300)))


def test_what_differs_is_refused_and_nothing_is_left(tmp_path):
    paths = [save(tmp_path / "0", weights(0)), save(tmp_path / "1", weights(1))]
    before = files(tmp_path)
    for change, kind, message in (
        ({"w": torch.ones(7, 5)}, StructureError, r"'w' is float32 of shape \(5, 7\) in 0"),
        ({"more": torch.ones(1)}, StructureError, "0 lacks 'more'"),
        ({"steps": torch.tensor(41)}, StateError, "'steps' of int64 differs between 0 and 2"),
        ({"half": torch.full((9,), torch.nan).bfloat16()}, StateError, "'half' of 2 holds NaN"),
    ):
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        bad = save(tmp_path / "2", weights(2, **change))
        with pytest.raises(kind, match=message):
            average([*paths, bad], tmp_path / "out", trust=True)
    assert [name for name in files(tmp_path) if not name.startswith("2")] == before
    average([*paths], tmp_path / "out", trust=True, dry_run=True)
    assert not (tmp_path / "out").exists()
    average(paths, tmp_path / "out", trust=True)
    with pytest.raises(FileExistsError, match="--force"):
        average(paths, tmp_path / "out", trust=True)
    with pytest.raises(FileExistsError, match="one of the checkpoints"):
        average(paths, paths[0], trust=True, force=True)


def test_memory_does_not_grow_with_checkpoints(tmp_path):
    size = 4_000_000  # 16 MB each
    paths = [save(tmp_path / f"{n}", {"w": torch.full((size,), float(n))}) for n in range(4)]
    tracemalloc.start()
    try:
        average(paths, tmp_path / "out", hashes=False, trust=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14e6
    found = load(tmp_path / "out", {"w": torch.zeros(size)})["w"]
    assert torch.equal(found, torch.full((size,), 1.5))


def test_damaged_folders_are_refused_and_leave_nothing(tmp_path):
    path = save(tmp_path / "a", weights(0))
    contents = {name: (path / name).read_bytes() for name in (".metadata", "__0_0.distcp")}
    rng = np.random.default_rng(0)
    refused = 0
    for round_ in range(40):
        for name, content in contents.items():
            (path / name).write_bytes(content)
        name = [*contents][round_ % 2]
        end = rng.integers(1, len(contents[name])) if rng.random() < 0.3 else None
        damaged = bytearray(contents[name][:end])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (path / name).write_bytes(damaged)
        try:
            average([path], tmp_path / "out", hashes=False, force=True, trust=True)
        except (StateError, StructureError):
            refused += 1
        assert not [left for left in os.listdir(tmp_path) if left.startswith(".")]
    assert refused > 15


def test_other_folders_are_left_to_others(tmp_path):
    with pytest.raises(StateError, match="no checkpoint of a kind"):
        open_checkpoint(tmp_path)


def test_every_class_of_a_description_is_known():
    # A later torch that writes another one is found here, and not by a user.
    import torch.distributed.checkpoint.metadata as theirs

    known = {name for module, name in distributed_metadata._KNOWN if module == theirs.__name__}
    written = {name for name in theirs.__all__ if re.fullmatch(r"[A-Z]\w+", name)}
    assert written <= known
