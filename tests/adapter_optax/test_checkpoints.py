"""``swa average`` on folders of Orbax, which Orbax restores again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from flax.training.train_state import TrainState

from swa_core import StateError, StructureError
from swa_core.checkpoints import average, open_checkpoint
from swa_core.checkpoints.tensors import Piece
from swa_core.cli import main

# Orbax's own, where it is not told where arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
FORMS = ("ocdbt", "plain", "zarr3")


@pytest.fixture(autouse=True)
def quiet(relaxed_jax):
    logging.getLogger("absl").setLevel(logging.ERROR)


def tree(seed, **more):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "dense": {
                "kernel": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
                "bias": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
                "zeros": jnp.zeros((3, 2)),
            },
            "list": [jnp.asarray(rng.normal(size=()), jnp.float32), None],
            "nothing": {},
            "half": jnp.asarray(rng.normal(size=4), jnp.float16),
        },
        "host": rng.normal(size=3),
        "steps": 40,
        "rate": 0.5 + seed,
        "name": "net",
        "empty": {},
        **more,
    }


def saver(form):
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=form != "plain", use_zarr3=form == "zarr3")
    )


def save(path, held, form="ocdbt", **how):
    with saver(form) as checkpointer:
        checkpointer.save(path, held, **how)
    return path


def restore(path, **how):
    with saver("ocdbt") as checkpointer:
        return checkpointer.restore(path, **how)


def mean(trees, path):
    parts = trees
    for step in path:
        parts = [part[step] for part in parts]
    total = sum(np.asarray(part, np.float64) for part in parts) / len(parts)
    return total, np.asarray(parts[0])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_mean_in_a_folder_that_orbax_restores(tmp_path, form):
    trees = [tree(seed) for seed in range(3)]
    paths = [save(tmp_path / f"{n}", held, form) for n, held in enumerate(trees)]
    plan = average(paths, tmp_path / "out")
    found = restore(tmp_path / "out")
    assert jax.tree.structure(found) == jax.tree.structure(trees[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        steps = [getattr(step, "key", getattr(step, "idx", None)) for step in path]
        if steps == ["name"]:
            assert leaf == "net"
            continue
        expected, first = mean(trees, steps)
        assert (np.asarray(leaf).dtype, np.shape(leaf)) == (first.dtype, first.shape), steps
        tolerance = {"bias": 2**-8, "half": 2**-10}.get(steps[-1], 1e-6)
        np.testing.assert_allclose(np.asarray(leaf, "f8"), expected, rtol=tolerance, atol=tolerance)
    assert (len(plan.tensors), plan.averaged) == (8, 7)
    assert plan.tensors["params/dense/bias"] == ("bfloat16", (7,))
    # Into arrays of the caller's own.
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trees[0]["params"])
    average(paths, tmp_path / "params", key="params")
    arguments = ocp.checkpoint_utils.construct_restore_args({"params": abstract})
    only = restore(tmp_path / "params", item={"params": abstract}, restore_args=arguments)
    for one, other in zip(*map(jax.tree.leaves, (only["params"], found["params"])), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    # The result is a checkpoint to average like any other.
    average([tmp_path / "out"], tmp_path / "again")
    again = restore(tmp_path / "again")
    for one, other in zip(*map(jax.tree.leaves, (again, found)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def managed(root, seeds, make):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(root, options=options) as manager:
        for step, seed in enumerate(seeds, start=1):
            manager.save(step, args=make(seed))


def test_steps_of_a_manager_become_a_step_of_another(tmp_path, capsys):
    trees = [{"params": tree(n)["params"], "steps": n} for n in range(3)]
    managed(tmp_path / "run", range(3), lambda n: ocp.args.StandardSave(trees[n]))
    with pytest.raises(StateError, match=r"run holds the checkpoints 1, 2, 3.\n.*'run/\*'"):
        open_checkpoint(tmp_path / "run")
    arguments = ["average", str(tmp_path / "run" / "*"), "--integers", "last", "--quiet"]
    assert main([*arguments, "-o", str(tmp_path / "mean" / "3")]) == 0
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trees[0])
    with ocp.CheckpointManager(tmp_path / "mean") as manager:
        assert manager.latest_step() == 3
        found = manager.restore(3, args=ocp.args.StandardRestore(abstract))
    assert found["steps"] == 2
    expected, _ = mean(trees, ["params", "dense", "kernel"])
    np.testing.assert_allclose(found["params"]["dense"]["kernel"], expected, rtol=1e-6)
    said = json.loads((tmp_path / "mean" / "3.provenance.json").read_text())
    assert len(said["inputs"][0]["files"]) == len(files(tmp_path / "run" / "1"))
    assert "default/manifest.ocdbt" in said["inputs"][0]["files"]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "mean" / "3")]) == 0
    assert "params/dense/bias    bfloat16  (7,)" in capsys.readouterr().out


def test_items_of_a_step(tmp_path):
    def items(n):
        return ocp.args.Composite(
            params=ocp.args.StandardSave(tree(n)["params"]),
            optimizer=ocp.args.PyTreeSave({"m": jnp.full(2, float(n))}),
            about=ocp.args.JsonSave({"seed": n}),
        )

    managed(tmp_path / "run", range(2), items)
    paths = [tmp_path / "run" / str(step) for step in (1, 2)]
    with pytest.raises(StateError, match=r"of an optimizer, 'optimizer'.\n.*--key '\*'"):
        average(paths, tmp_path / "mean" / "1")
    average(paths, tmp_path / "mean" / "1", key="params")
    average(paths, tmp_path / "all" / "1", key="*")
    expected, _ = mean([tree(n)["params"] for n in range(2)], ["half"])
    for root, held in (("mean", {"params"}), ("all", {"params", "optimizer", "about"})):
        with ocp.CheckpointManager(tmp_path / root) as manager:
            wanted = {
                "params": ocp.args.StandardRestore(),
                "optimizer": ocp.args.PyTreeRestore(),
                "about": ocp.args.JsonRestore(),
            }
            some = ocp.args.Composite(**{name: wanted[name] for name in held})
            found = manager.restore(1, args=some)
        np.testing.assert_allclose(found["params"]["half"], expected, rtol=2**-10)
        folders = {path.name for path in (tmp_path / root / "1").iterdir() if path.is_dir()}
        assert folders == held
    np.testing.assert_array_equal(found["optimizer"]["m"], [0.5, 0.5])
    assert found["about"] == {"seed": 0}


def test_a_train_state_and_one_file_of_safetensors(tmp_path):
    def trained(seed):
        network = nn.Dense(3)
        params = network.init(jax.random.key(seed), jnp.ones((1, 2)))["params"]
        state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(0.1))
        return state.apply_gradients(grads=params)

    states = [trained(seed) for seed in range(2)]
    paths = [save(tmp_path / str(n), state) for n, state in enumerate(states)]
    with pytest.raises(StateError, match=r"'opt_state'.\nHint: .*it holds 'step', 'params'"):
        average(paths, tmp_path / "out.safetensors")
    average(paths, tmp_path / "out.safetensors", key="params")
    found = safetensors.flax.load_file(tmp_path / "out.safetensors")
    assert sorted(found) == ["bias", "kernel"]
    expected = (states[0].params["kernel"] + states[1].params["kernel"]) / 2
    np.testing.assert_array_equal(found["kernel"], expected)
    # Deeper, and moments that were asked for.
    average(paths, tmp_path / "moments", key="opt_state/0/mu")
    moments = restore(tmp_path / "moments")["opt_state"][0]["mu"]["kernel"]
    mu = [state.opt_state[0].mu["kernel"] for state in states]
    np.testing.assert_array_equal(moments, (mu[0] + mu[1]) / 2)
    with pytest.raises(StateError, match=r"0 has no part 'parms'.\nHint: it holds 'step'"):
        average(paths, tmp_path / "none", key="parms")


@pytest.mark.parametrize("form", FORMS)
def test_arrays_in_many_chunks_are_read_row_of_chunks_by_row(tmp_path, form):
    shape = (64, 96, 128)  # 3 MB
    held = [{"w": jnp.full(shape, n) + jnp.arange(64.0)[:, None, None]} for n in (1.0, 2.0)]
    some = {"w": ocp.SaveArgs(chunk_byte_size=1 << 18)}
    paths = [save(tmp_path / str(n), h, form, save_args=some) for n, h in enumerate(held)]
    opened = open_checkpoint(paths[0])
    stretch = opened.stretch("w")
    whole = np.asarray(held[0]["w"]).reshape(-1)
    assert 1 < stretch < whole.size
    # Any stretch, not only those of whole chunks.
    for begin, end in ((0, 5), (3, 96 * 128 + 1), (stretch - 1, stretch + 7)):
        np.testing.assert_array_equal(opened.read(Piece("w", begin, end)), whole[begin:end])
    average(paths, tmp_path / "out")
    np.testing.assert_array_equal(restore(tmp_path / "out")["w"], (held[0]["w"] + held[1]["w"]) / 2)


def test_memory_does_not_grow_with_checkpoints(tmp_path):
    held = {"w": jnp.ones(2_000_000), "v": jnp.ones(2_000_000)}  # 16 MB each, in two arrays
    paths = [save(tmp_path / "0", held)]
    for n in range(1, 5):
        paths.append(shutil.copytree(paths[0], tmp_path / str(n)))
    tracemalloc.start()
    try:
        average(paths, tmp_path / "out", hashes=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Whole arrays are read, of a few checkpoints at once; five of them are 80 MB.
    assert peak < 64e6


def changed(path, change):
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def key_of(said, *steps):
    (entry,) = [
        entry
        for entry in said["tree_metadata"].values()
        if [step["key"] for step in entry["key_metadata"]] == ["v"]
    ]
    entry["key_metadata"] = [{"key": step, "key_type": 2} for step in steps]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: key_of(said, "none"), "tensor 'none' cannot be opened"),
        (lambda said: key_of(said, "a\0b"), "cannot be opened|outside of its folder|no arrays"),
        (lambda said: key_of(said, "\ud800"), "cannot be opened|outside of its folder|no arrays"),
        (lambda said: key_of(said, "w"), "two arrays have the path 'w'"),
        (lambda said: said.pop("tree_metadata"), "no description"),
        (lambda said: said.update(tree_metadata=[1]), "no description"),
        (lambda said: said["tree_metadata"].update(x=5), "no description"),
        (lambda said: said["tree_metadata"].clear(), "holds no arrays"),
    ],
)
def test_a_description_that_is_not_true_is_refused(tmp_path, form, change, message):
    path = save(tmp_path / "a", {"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, form)
    changed(path / "_METADATA", change)
    with pytest.raises(StateError, match=message):
        open_checkpoint(path)


def test_arrays_outside_of_the_folder_are_refused(tmp_path):
    path = save(tmp_path / "a", {"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, "plain")
    save(tmp_path / "b", {"secret": jnp.ones(3)}, "plain")
    changed(path / "_METADATA", lambda said: key_of(said, "/../b/secret"))
    # A step that begins with a slash, and one that leads up; and a link.
    with pytest.raises(StateError, match="outside of its folder"):
        open_checkpoint(path)
    path = save(tmp_path / "c", {"w": jnp.ones((2, 3)), "v": jnp.ones(2)}, "plain")
    shutil.rmtree(path / "v")
    (path / "v").symlink_to(tmp_path / "b" / "secret")
    with pytest.raises(StateError, match="outside of its folder"):
        open_checkpoint(path)


def test_an_array_that_claims_more_than_the_memory_is_refused(tmp_path):
    path = save(tmp_path / "a", {"w": jnp.ones((2, 3))}, "plain")
    changed(
        path / "w" / ".zarray",
        lambda said: said.update(shape=[10**6, 10**6], chunks=[10**6, 10**6]),
    )
    with pytest.raises(StateError, match="more than a quarter of this machine's memory at once"):
        open_checkpoint(path)
    # A chunk that is larger than its array is unpacked as a whole, too.
    changed(path / "w" / ".zarray", lambda said: said.update(shape=[2, 3], chunks=[2, 10**12]))
    with pytest.raises(StateError, match=r"\(2, 3\) and chunks of \(2, 1000000000000\)"):
        open_checkpoint(path)
    changed(path / "w" / ".zarray", lambda said: said.update(shape=[10**6, 10**6]))
    # In small chunks it needs no memory, but room.
    changed(path / "w" / ".zarray", lambda said: said.update(chunks=[1, 1000]))
    with pytest.raises(OSError, match="4000000000000 bytes are to be written"):
        average([path], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_dtype_that_is_not_averaged(tmp_path):
    path = save(tmp_path / "a", {"w": jnp.zeros(2, jnp.float8_e4m3fn)})
    with pytest.raises(StateError, match="'w' of a: it has dtype float8_e4m3fn"):
        open_checkpoint(path)


def test_what_differs_is_refused_and_nothing_is_left(tmp_path):
    paths = [save(tmp_path / "0", tree(0)), save(tmp_path / "1", tree(1))]
    for change, kind, message in (
        ({"host": np.ones(2)}, StructureError, r"'host' is float64 of shape \(3,\) in 0"),
        ({"more": jnp.ones(1)}, StructureError, "0 lacks 'more'"),
        ({"steps": 41}, StateError, "'steps' of int64 differs between 0 and 2"),
        ({"host": np.full(3, np.nan)}, StateError, "'host' of 2 holds NaN"),
    ):
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        bad = save(tmp_path / "2", tree(2, **change))
        with pytest.raises(kind, match=message):
            average([*paths, bad], tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]
    average(paths, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    average(paths, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--force"):
        average(paths, tmp_path / "out")
    with pytest.raises(FileExistsError, match="one of the checkpoints"):
        average(paths, paths[0], force=True)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_folders_are_refused_and_leave_nothing(tmp_path, form):
    path = save(tmp_path / "a", {"w": jnp.arange(300.0).reshape(3, 100)}, form)
    contents = {name: (path / name).read_bytes() for name in files(path)}
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(15):
        name = list(contents)[rng.integers(len(contents))]
        content = contents[name]
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (path / name).write_bytes(damaged)
        try:
            average([path], tmp_path / "out", hashes=False, force=True)
        except (StateError, StructureError):
            refused += 1
        assert not [left for left in os.listdir(tmp_path) if left.startswith(".")]
        (path / name).write_bytes(content)
    assert refused >= 3


def test_without_tensorstore_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = save(tmp_path / "a", {"w": jnp.ones(2)})
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(StateError, match=r'pip install "swa-core\[orbax\]"'):
        open_checkpoint(path)
