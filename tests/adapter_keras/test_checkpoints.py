"""``swa average`` on what Keras has saved."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile

import h5py
import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, dense

from swa_core import StateError
from swa_core.checkpoints import average, open_checkpoint


def trained(seed):
    model = dense()
    model.fit(X + seed, Y, verbose=0)
    return model


def values(model):
    return [np.array(a) for a in model.get_weights()]


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_the_model_loads_the_mean(tmp_path, suffix):
    models = [trained(seed) for seed in range(3)]
    paths = []
    for number, model in enumerate(models):
        paths.append(tmp_path / f"{number}{suffix}")
        (model.save if suffix == ".keras" else model.save_weights)(paths[-1])
    out = tmp_path / f"out{suffix}"
    average(paths, out)
    if suffix == ".keras":
        found = keras.models.load_model(out)
        assert int(keras.ops.convert_to_numpy(found.optimizer.iterations)) == 1
    else:
        found = dense()
        found.optimizer.build(found.trainable_variables)
        found.load_weights(out)
    for array, *parts in zip(values(found), *map(values, models), strict=True):
        np.testing.assert_allclose(array, np.mean(parts, 0), rtol=1e-6, atol=1e-7)


class Counted(keras.layers.Layer):
    """A layer with a whole number."""

    def build(self, shape):
        self.seen = self.add_weight(shape=(), dtype="int32", trainable=False, initializer="zeros")

    def call(self, x):
        return x


def test_whole_numbers_that_differ_and_batch_norm(tmp_path):
    def counted():
        return keras.Sequential(
            [keras.Input((4,)), Counted(), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
        )

    models = [counted() for _ in range(2)]
    paths = [tmp_path / f"{number}.weights.h5" for number in range(2)]
    for number, model in enumerate(models):
        model.layers[0].seen.assign(number)
        model.layers[1].moving_mean.assign([number] * 4)
        model.save_weights(paths[number])
    with pytest.raises(StateError, match=r"'layers/counted\w*/vars/0' of int32 differs"):
        average(paths, tmp_path / "out.weights.h5")
    average(paths, tmp_path / "out.weights.h5", integers="last")
    found = counted()
    found.load_weights(tmp_path / "out.weights.h5")
    # Statistics of batch norm are averaged like weights: recompute them with update_bn.
    for array, *parts in zip(values(found), *map(values, models), strict=True):
        expected = parts[-1] if array.dtype.kind in "iu" else np.mean(parts, 0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)


def half(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])


def test_bfloat16_is_summed_wide(tmp_path):
    models = [half(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_weights(tmp_path / f"{number}.weights.h5")
    average([tmp_path / f"{n}.weights.h5" for n in range(3)], tmp_path / "out.weights.h5")
    found = half()
    found.load_weights(tmp_path / "out.weights.h5")

    def kernel(model):
        return keras.ops.convert_to_numpy(keras.ops.cast(model.layers[0].kernel, "float32"))

    expected = np.mean([kernel(model) for model in models], 0)
    np.testing.assert_allclose(kernel(found), expected, rtol=2**-8)


@pytest.mark.parametrize(
    ("number", "length", "message"),
    [
        # HDF5's own reader would not return from this one.
        (0, 0, "a heap of it is damaged"),
        (0, 8, "a heap of it is damaged"),
        (1, 2**63, "a heap of it is damaged"),
        (None, 2**40, "a heap of it is truncated"),
        (None, 3, "a heap of it is truncated"),
    ],
)
def test_a_file_with_a_damaged_heap_is_refused(tmp_path, number, length, message):
    path = tmp_path / "a.weights.h5"
    half().save_weights(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"GCOL")  # where it keeps the names of dtypes
    if number is None:
        content[place + 8 : place + 16] = struct.pack("<Q", length)
    else:
        content[place + 16 : place + 32] = struct.pack("<H6xQ", number, length)
    path.write_bytes(content)
    with pytest.raises(StateError, match=message):
        open_checkpoint(path)


def hostile(path, change):
    trained(0).save_weights(path)
    with h5py.File(path, "r+") as file:
        change(file)


def external(file):
    file["layers"]["out"] = h5py.ExternalLink("other.h5", "/")


def soft(file):
    file["layers"]["out"] = h5py.SoftLink("/vars")


def elsewhere(file):
    file.create_dataset("layers/x", (3,), "f4", external=[("/etc/hostname", 0, 12)])


def virtual(file):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    file.create_virtual_dataset("layers/x", layout)


def packed(file):
    file.create_dataset("layers/x", (1000,), "f4", compression="gzip")


def looped(file):
    file["layers/again"] = file["layers"]


def text(file):
    file["layers/x"] = "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "'layers/out' is a link that may lead out"),
        (soft, "'layers/out' is a link that may lead out"),
        (elsewhere, "'layers/x' is not stored plainly"),
        (virtual, "'layers/x' is not stored plainly"),
        (packed, "'layers/x' is not stored plainly"),
        (looped, "'layers/again/' stands in it twice"),
        (text, "'layers/x' has dtype object"),
    ],
)
def test_what_leads_out_of_the_file_or_is_not_plain_is_refused(tmp_path, change, message):
    hostile(tmp_path / "a.weights.h5", change)
    with pytest.raises(StateError, match=message):
        open_checkpoint(tmp_path / "a.weights.h5")


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_damaged_files_are_refused_and_leave_nothing(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    model = trained(0)
    (model.save if suffix == ".keras" else model.save_weights)(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        end = rng.integers(1, len(content)) if rng.random() < 0.5 else len(content)
        damaged = bytearray(content[:end])
        for place in rng.integers(len(damaged), size=20):
            damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        out = tmp_path / f"out{suffix}"
        try:
            average([path], out, hashes=False, force=True)
        except StateError:
            refused += 1
    assert refused > 15
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def rewritten(path, change):
    """A .keras file with other members, of which checksums are right."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, content)


@pytest.mark.parametrize("member", ["model.weights.h5", "assets/x"])
def test_a_keras_file_that_would_unfold_is_refused(tmp_path, member):
    trained(0).save(tmp_path / "a.keras")
    rewritten(tmp_path / "a.keras", lambda members: members.update({member: bytes(10**7)}))
    with pytest.raises(
        StateError, match=rf"its member '{member}' would unfold from \d+ to 10000000"
    ):
        open_checkpoint(tmp_path / "a.keras")
    # Packed as others do it, it is read.
    trained(0).save(tmp_path / "b.keras")
    rewritten(tmp_path / "b.keras", lambda members: None)
    average([tmp_path / "b.keras"], tmp_path / "out.keras")
    assert np.all(
        values(keras.models.load_model(tmp_path / "out.keras"))[0] == values(trained(0))[0]
    )


def test_a_keras_file_whose_other_members_are_damaged(tmp_path):
    path = tmp_path / "a.keras"
    trained(0).save(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        place = file.getinfo("config.json").header_offset
    path.write_bytes(content[:place] + b"PX" + content[place + 2 :])
    with pytest.raises(StateError, match=r"cannot read a\.keras: it is damaged \(Bad magic"):
        average([path], tmp_path / "out.keras")
    assert os.listdir(tmp_path) == ["a.keras"]


def test_a_keras_file_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(StateError, match=r"it is no \.keras file"):
        open_checkpoint(tmp_path / "a.keras")
    shutil.copy(tmp_path / "a.keras", tmp_path / "a.weights.h5")
    with pytest.raises(StateError, match="it is no HDF5 file of weights"):
        open_checkpoint(tmp_path / "a.weights.h5")
    with pytest.raises(StateError, match="has no parts such as 'model'"):
        open_checkpoint(tmp_path / "a.keras", key="model")
