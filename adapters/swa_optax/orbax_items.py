"""One tree of arrays as Orbax lays it out: a description in JSON, and arrays in the zarr format,
each a folder of its own or all in one OCDBT database.

Source:
  https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from swa_core.checkpoints import Spec
from swa_core.checkpoints.containing import is_contained
from swa_core.checkpoints.safetensors_format import copy_beside
from swa_core.errors import StateError

DESCRIPTION = "_METADATA"
_DATABASE = "manifest.ocdbt"
_NAMES = "array_metadatas"
_DTYPES = frozenset(
    ("bfloat16", "float16", "float32", "float64", "complex64", "complex128", "bool")
) | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
# The folder is flushed to the disk as a whole, when it is complete.
_CONTEXT = {"file_io_sync": False}


class Stored(NamedTuple):
    """An array of a tree.

    Attributes:
      steps: where it stands in the tree.
      spec: what it is.
      array: the open tensorstore array.
      row_of_chunks: elements in all chunks that share their place in the first dimension.
    """

    steps: tuple[str, ...]
    spec: Spec
    array: Any
    row_of_chunks: int


class Item:
    """The arrays of a folder with a description."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._name = name
        self._said = _json(folder / DESCRIPTION, name)
        self._is_database = (folder / _DATABASE).is_file()
        try:
            self._driver = "zarr3" if self._said.get("use_zarr3") else "zarr"
            places = [
                _steps(entry)
                for entry in self._said["tree_metadata"].values()
                if _is_array(entry["value_metadata"])
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise broken(name, f"its {DESCRIPTION} is no description ({error!r})") from error
        try:
            opening = [(steps, self._open(folder, steps)) for steps in places]
        except StateError:
            raise
        except Exception as error:  # whatever tensorstore makes of names that are none
            raise broken(name, f"its {DESCRIPTION} names no arrays ({error})") from error
        self.arrays = [self._found(steps, future) for steps, future in opening]

    def created(self, target: Path, stored: Stored, transaction: Any) -> Any:
        """An array to be written, of the shape, dtype and chunks of one of this item; a future."""
        return self._open(
            target,
            stored.steps,
            create=True,
            transaction=transaction,
            metadata=stored.array.spec().to_json()["metadata"],
            # Orbax takes what is not there for lost.
            store_data_equal_to_fill_value=True,
        )

    def copy_description(self, target: Path, is_kept: Callable[[tuple[str, ...]], bool]) -> None:
        """Everything but the arrays; of the description the part that is kept, with its empty
        branches and strings."""
        target.mkdir(parents=True, exist_ok=True)
        copy_beside(self.folder, target, {self.folder / _DATABASE})
        if (self.folder / _NAMES).is_dir():
            shutil.copytree(self.folder / _NAMES, target / _NAMES)
        tree = self._said["tree_metadata"]
        kept = {key: entry for key, entry in tree.items() if is_kept(_steps(entry))}
        if len(kept) < len(tree):
            text = json.dumps({**self._said, "tree_metadata": kept})
            (target / DESCRIPTION).write_text(text, encoding="utf-8")

    def _open(self, folder: Path, steps: tuple[str, ...], **how: Any) -> Any:
        """A future of an array."""
        name = ".".join(steps)
        if self._is_database:
            base = f"file://{folder.resolve()}/"
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            path = folder / name
            if not is_contained(folder, name):
                raise StateError(
                    f"the {DESCRIPTION} of {self._name} names the array {name!r} outside of its "
                    "folder.",
                    hint="do not use this checkpoint unless you know who made it.",
                )
            store = {"driver": "file", "path": f"{path.resolve()}/"}
        spec = {"driver": self._driver, "kvstore": store, "context": _CONTEXT}
        for key in ("metadata", "store_data_equal_to_fill_value"):
            if key in how:
                spec[key] = how.pop(key)
        return tensorstore().open(spec, **(how or {"open": True, "read": True}))

    def _found(self, steps: tuple[str, ...], future: Any) -> Stored:
        name = "/".join(steps)
        try:
            array = future.result()
        except Exception as error:  # tensorstore's are of many kinds
            first = str(error).splitlines()[0]
            raise broken(self._name, f"tensor '{name}' cannot be opened ({first})") from error
        if array.dtype.name not in _DTYPES:
            raise StateError(
                f"cannot read tensor '{name}' of {self._name}: it has dtype {array.dtype.name}.",
                hint="only numbers and booleans of the usual dtypes are averaged.",
            )
        spec = Spec(array.dtype.name, tuple(array.shape))
        chunk = array.chunk_layout.write_chunk.shape or ()
        # tensorstore would allocate one, and end the process where it cannot.
        if any(part > max(size, 1) for part, size in zip(chunk, spec.shape, strict=True)):
            raise broken(
                self._name,
                f"tensor '{name}' has shape {spec.shape} and chunks of {tuple(chunk)}",
            )
        row = math.prod(spec.shape[1:]) * min(chunk[0], spec.shape[0]) if spec.shape else 1
        if row * spec.storage.itemsize > _memory() // 4:
            raise StateError(
                f"cannot read tensor '{name}' of {self._name}: of shape {spec.shape} in chunks of "
                f"{tuple(chunk)}, it takes more than a quarter of this machine's memory at once.",
                hint="save it in smaller chunks; or somebody made it to fill your memory.",
            )
        return Stored(steps, spec, array, max(row, 1))


def broken(name: str, what: str) -> StateError:
    """The error of a folder that is damaged."""
    return StateError(f"cannot read {name}: {what}.", hint="copy it once more.")


def _json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise broken(name, f"its {path.name} is no JSON ({error})") from error


def _steps(entry: Any) -> tuple[str, ...]:
    """Where an entry of the description stands in the tree."""
    return tuple(str(step["key"]) for step in entry["key_metadata"])


def _is_array(said: Any) -> bool:
    """Strings and empty branches of the tree are none; they stand in the descriptions."""
    return not said.get("skip_deserialize") and said.get("value_type") not in ("string", "None")


def _memory() -> int:
    """The machine's memory [bytes]."""
    if not hasattr(os, "sysconf"):  # Windows
        return 1 << 34
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensorstore() -> Any:
    """The package, which only those need who have such folders."""
    try:
        import tensorstore as found
    except ImportError as error:
        raise StateError(
            f"Orbax folders cannot be read: {error}.", hint='pip install "swa-core[orbax]"'
        ) from error
    return found
