"""Small checkpoints of every kind, and what is done to them.

A checkpoint is its files' contents by path; a path instead of contents is a link.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fuzz import mutations
from fuzz.mutations import Rng, any_bytes, pick

Contents = dict[str, "bytes | Path"]


class Format(NamedTuple):
    """A kind of checkpoint.

    Attributes:
      name: of the kind, in the table.
      adapter: that reads it, or None for the core.
      file: its name; that of a folder where ``contents`` has several.
      make: writes a sound one, of numbers that depend on a seed, to a path.
      special: mutations of this kind alone, of all contents.
      trust: whether descriptions that are pickles are read.
      is_average: whether it is read with load_average, too.
    """

    name: str
    adapter: str | None
    file: str
    make: Callable[[Path, int], None]
    special: Sequence[Callable[[Contents, Rng], Contents]] = ()
    trust: bool = False
    is_average: bool = False


def contents_of(path: Path) -> Contents:
    if path.is_file():
        return {"": path.read_bytes()}
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def put(contents: Contents, path: Path) -> None:
    for name, content in contents.items():
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            file.symlink_to(content)
        else:
            file.write_bytes(content)


def mutated(form: Format, contents: Contents, rng: Rng) -> Contents:
    changed = dict(contents)
    if form.special and rng.random() < 0.5:
        changed = pick(rng, form.special)(changed, rng)
        if rng.random() < 0.8:
            return changed
    name = pick(rng, [*changed])
    content = changed[name]
    if isinstance(content, bytes):
        changed[name] = any_bytes(content, rng)
    if len(changed) > 1 and rng.random() < 0.05:
        del changed[name]
    return changed


def each(change: mutations.Mutation, *suffixes: str) -> Callable[[Contents, Rng], Contents]:
    """A mutation of one of the files whose names end so."""

    def apply(contents: Contents, rng: Rng) -> Contents:
        names = [name for name in contents if name.endswith(suffixes or "")]
        name = pick(rng, names)
        content = contents[name]
        return {**contents, name: change(content, rng)} if isinstance(content, bytes) else contents

    return apply


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "dense/kernel": rng.normal(size=(5, 7)).astype("f4"),
        "dense/bias": rng.normal(size=7).astype("f2"),
        "steps": np.int64(40),
        "empty": np.zeros((0, 3), "f4"),
    }


# The core's own.


def safetensors(path: Path, seed: int) -> None:
    from swa_core.safetensors_files import write

    write(path, arrays(seed), {"format": "pt"})


def average_file(path: Path, seed: int) -> None:
    from swa_core import Schedule, SWAConfig, SWAState, save_average

    held = {name: array for name, array in arrays(seed).items() if name != "steps"}
    state = SWAState(9, 3, 1, 3.0, held)
    config = SWAConfig(start="4step", every="2step")
    save_average(path, state, config, schedule=Schedule(4, 2), beside={"x": np.arange(3.0)})


def description_changed(contents: Contents, rng: Rng) -> Contents:
    """What an average says of itself, JSON in the JSON of the header."""
    content = contents[""]
    assert isinstance(content, bytes)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    said = header["__metadata__"]["swa"].encode()
    change = mutations.json_changed if rng.random() < 0.8 else any_bytes
    header["__metadata__"]["swa"] = change(said, rng).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    return {"": struct.pack("<Q", len(text)) + text + content[8 + length :]}


def sharded(path: Path, seed: int) -> None:
    from swa_core.safetensors_files import write

    path.mkdir(parents=True)
    held = arrays(seed)
    parts = {"model-1-of-2.safetensors": ["dense/kernel", "steps"]}
    parts["model-2-of-2.safetensors"] = ["dense/bias", "empty"]
    for name, names in parts.items():
        write(path / name, {key: held[key] for key in names}, {"format": "pt"})
    index = {"weight_map": {key: name for name, names in parts.items() for key in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")


def led_outside(contents: Contents, rng: Rng) -> Contents:
    index = json.loads(contents["model.safetensors.index.json"])
    outside = ["../secret", "/etc/hostname", "link", "..", ".", "", "config.json", "a/../.."]
    where = pick(rng, outside)
    index["weight_map"][pick(rng, [*index["weight_map"]])] = where
    contents["model.safetensors.index.json"] = json.dumps(index).encode()
    if where == "link":
        contents["link"] = Path("/etc/hostname")
    return contents


def npz(path: Path, seed: int) -> None:
    save = np.savez if seed % 2 else np.savez_compressed
    save(path, **{name.replace("/", "."): array for name, array in arrays(seed).items()})


def npz_bomb(contents: Contents, rng: Rng) -> Contents:
    head = io.BytesIO()
    said = {
        "descr": "<f4",
        "fortran_order": False,
        "shape": (pick(rng, (75 * 10**6 // 2, 10**12)),),
    }
    np.lib.format.write_array_header_1_0(head, said)
    return {"": mutations.packed_zeros("dense.kernel.npy", head.getvalue())}


# torch


def state(seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(5, 7, generator=generator)
    return {
        "kernel": kernel,
        "tied": kernel,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "turned": torch.randn(3, 4, generator=generator).t(),
        "steps": torch.tensor(40),
    }


def torch_file(path: Path, seed: int) -> None:
    import torch

    torch.save(state(seed), path)


def torch_old_file(path: Path, seed: int) -> None:
    import torch

    torch.save(state(seed), path, _use_new_zipfile_serialization=False)


def torch_nested(path: Path, seed: int) -> None:
    import torch

    torch.save({"model": state(seed), "epoch": 3}, path)


def strided(contents: Contents, rng: Rng) -> Contents:
    """Tensors that claim more than there is."""
    import torch

    held = torch.arange(4.0)
    size, stride = pick(rng, [((10**12,), (0,)), ((4, 10**10), (1, 0)), ((2, 2), (0, 0))])
    saved = io.BytesIO()
    torch.save({**state(0), "kernel": held.as_strided(size, stride)}, saved)
    return {"": saved.getvalue()}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def distributed(path: Path, seed: int) -> None:
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.save({**state(seed), "epoch": 3}, checkpoint_id=path, no_dist=True)


def blob_changed(contents: Contents, rng: Rng) -> Contents:
    """Names and numbers in pickles, of the same length."""
    name = pick(rng, [*contents])
    content = contents[name]
    assert isinstance(content, bytes)
    found = pick(rng, [b"torch", b"Storage", b"K\x05", b"K\x07", b"float32", b"storage", b"cpu"])
    other = pick(rng, [b"posix", b"builtin", b"K\xff", b"M\xff", b"N0", b"\x8a\x08"])
    other = (other + b"x" * len(found))[: len(found)]
    return {**contents, name: content.replace(found, other, 1)}


# Keras


def _keras_model(seed: int) -> Any:
    import keras

    keras.utils.set_random_seed(seed)
    layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    return keras.Sequential(layers)


def keras_weights(path: Path, seed: int) -> None:
    _keras_model(seed).save_weights(path)


def keras_file(path: Path, seed: int) -> None:
    _keras_model(seed).save(path)


def hdf5_changed(content: bytes, rng: Rng) -> bytes:
    """An HDF5 file made by its own library, with something in it that has no business there."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.h5")
        path.write_bytes(content)
        with h5py.File(path, "r+") as file:
            groups = [file]
            file.visititems(
                lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None
            )
            group = pick(rng, groups)
            pick(rng, _HDF5)(file, group, f"x{rng.integers(10**9)}")
        return path.read_bytes()


def _virtual(file: Any, group: Any, name: str) -> None:
    import h5py

    layout = h5py.VirtualLayout((10**6, 10**6), "f4")
    layout[0, :3] = h5py.VirtualSource("/etc/hostname", "x", (3,))
    group.create_virtual_dataset(name, layout)


def _link(kind: str, *arguments: str) -> Callable[[Any, Any, str], None]:
    def apply(file: Any, group: Any, name: str) -> None:
        import h5py

        group[name] = getattr(h5py, kind)(*arguments)

    return apply


def _looped(file: Any, group: Any, name: str) -> None:
    group[name] = file


def _dataset(*shape: int, dtype: str = "f4", **how: Any) -> Callable[[Any, Any, str], None]:
    return lambda file, group, name: group.create_dataset(name, shape, dtype, **how)


def _deep(file: Any, group: Any, name: str) -> None:
    group.create_group("/".join([name] * 600))


def _named(file: Any, group: Any, name: str) -> None:
    group.create_dataset(name, (3,), "i2").attrs["dtype"] = "bfloat16"


_HDF5 = [
    _virtual,
    _link("ExternalLink", "/etc/hostname", "/x"),
    _link("SoftLink", "/"),
    _link("SoftLink", "/none"),
    _looped,
    _dataset(10**6, 10**6),
    _dataset(10**6, 10**6, chunks=(10, 10), fillvalue=1),
    _dataset(10**5, 10**5, chunks=(10, 10), compression="gzip"),
    _dataset(3, external=[("/etc/hostname", 0, 12)]),
    _dataset(3, dtype="S5"),
    _dataset(3, dtype=">f4"),
    _deep,
    _named,
]  # fmt: skip


def in_the_archive(content: bytes, rng: Rng) -> bytes:
    """The HDF5 file in a .keras file changed."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        for info in source.infolist():
            held = source.read(info)
            if info.filename.endswith(".h5"):
                held = hdf5_changed(held, rng) if rng.random() < 0.5 else any_bytes(held, rng)
            target.writestr(info, held)
    return result.getvalue()


def keras_bomb(contents: Contents, rng: Rng) -> Contents:
    return {"": mutations.packed_zeros("model.weights.h5", b"\x89HDF\r\n\x1a\n")}


# Orbax


@functools.cache
def _orbax(is_database: bool) -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer(use_ocdbt=is_database)


def orbax(path: Path, seed: int, *, is_database: bool = True) -> None:
    import jax.numpy as jnp

    held = {name: array for name, array in arrays(seed).items() if array.size}
    held["half"] = jnp.ones(3, jnp.bfloat16) * seed
    with _quiet():
        _orbax(is_database).save(os.path.abspath(path), held)


orbax_plain = functools.partial(orbax, is_database=False)

_JSON = each(mutations.json_changed, "_METADATA", "_sharding", ".zarray", "process_0")
_ZIP = each(mutations.member_changed)

FORMATS = [
    Format("safetensors", None, "x.safetensors", safetensors, [each(mutations.header_changed)]),
    Format("safetensors, sharded", None, "x", sharded, [
        led_outside, each(mutations.json_changed, "index.json"),
        each(mutations.header_changed, ".safetensors"),
    ]),
    Format("average file", None, "x.safetensors", average_file, [
        description_changed, each(mutations.header_changed),
    ], is_average=True),
    Format(".npz", None, "x.npz", npz, [_ZIP, _ZIP, _ZIP, npz_bomb]),
    Format(".pt", "torch", "x.pt", torch_file, [_ZIP, _ZIP, blob_changed, strided]),
    Format(".pth, old form", "torch", "x.pth", torch_old_file, [blob_changed]),
    Format(".bin, with other parts", "torch", "x.bin", torch_nested, [_ZIP, blob_changed]),
    Format("torch.distributed", "torch", "x", distributed, [blob_changed]),
    Format("torch.distributed, trusted", "torch", "x", distributed, [blob_changed], trust=True),
    Format(".weights.h5", "keras", "x.weights.h5", keras_weights, [each(hdf5_changed)]),
    Format(".keras", "keras", "x.keras", keras_file, [
        _ZIP, each(in_the_archive), each(in_the_archive), keras_bomb,
    ]),
    Format("Orbax, OCDBT", "optax", "x", orbax, [_JSON]),
    Format("Orbax, plain", "optax", "x", orbax_plain, [_JSON]),
]  # fmt: skip
