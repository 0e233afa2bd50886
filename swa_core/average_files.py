"""An average as a file, which outlives the process and the framework that made it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from swa_core import safetensors_files, trees
from swa_core.averaging import SWAState
from swa_core.config import SWAConfig
from swa_core.errors import ConfigError, StateError, StructureError
from swa_core.rules import Rule
from swa_core.saving import header, read_header, read_schedule
from swa_core.schedule import Schedule

_KEY = "swa"
_BESIDE = "beside/"  # before the names of arrays that are no part of the average
_LIBRARIES = ("numpy", "torch", "tensorflow", "jax", "keras", "optax")


class AverageFile(NamedTuple):
    """What a file of an average holds.

    Attributes:
      state: its counters, and the average as a dictionary of arrays by path.
      config: the configuration that it was made with.
      schedule: the resolved schedule, if it was saved.
      framework: who saved it ("torch", "keras", "optax"), if that was said.
      versions: of Python and of the libraries in the process that saved it.
      extra: what the adapter that saved it needs beside this, plain JSON.
      beside: arrays that are no part of the average, by name.
      counts: n_averaged and total of leaves that joined later than the others, by path.
    """

    state: SWAState
    config: SWAConfig
    schedule: Schedule | None
    framework: str | None
    versions: dict[str, str]
    extra: dict[str, Any]
    beside: dict[str, npt.NDArray[Any]]
    counts: dict[str, tuple[int, float]]

    def renamed(
        self,
        names: Mapping[str, str],
        transform: Mapping[str, Callable[[npt.NDArray[Any]], Any]] | None = None,
    ) -> AverageFile:
        """The average under the names of another model, for a training that goes on elsewhere.

        What the adapter that saved it kept for itself is left out.

        Args:
          names: for every leaf of the model that goes on, the name in this file.
          transform: for leaves that lie otherwise there (transposed, say), what makes the one out
            of the other.

        Raises:
          StructureError: a name that the file does not have, or arrays that no leaf takes.

        >>> import tempfile
        >>> file = os.path.join(tempfile.mkdtemp(), "average.safetensors")
        >>> state = SWAState(7, 2, 0, 2.0, {"fc.weight": np.float32([[1, 2]])})
        >>> save_average(file, state, SWAConfig())
        >>> found = load_average(file).renamed({"dense/kernel": "fc.weight"},
        ...                                    {"dense/kernel": np.transpose})
        >>> found.state.average["dense/kernel"].shape
        (2, 1)
        """
        average = self.state.average
        for leaf, name in names.items():
            if name not in average:
                raise StructureError(
                    f"leaf '{leaf}' is to be '{name}', which the file does not hold.",
                    hint=f"it holds {_listed(average)}.",
                )
        if unused := [name for name in average if name not in set(names.values())]:
            raise StructureError(
                f"no leaf takes {_listed(unused)} of the file.",
                hint="every average of the file belongs to a leaf of the model that goes on.",
            )
        change = dict(transform or {})
        if unknown := [leaf for leaf in change if leaf not in names]:
            raise StructureError(
                f"there is a transform for {_listed(unknown)}, but no name in the file.",
                hint=f"names has {_listed(names)}.",
            )
        moved = {
            leaf: np.array(change.get(leaf, np.asarray)(average[name]))
            for leaf, name in names.items()
        }
        counts = {leaf: self.counts[name] for leaf, name in names.items() if name in self.counts}
        state = self.state._replace(average=moved)
        return self._replace(state=state, extra={}, beside={}, counts=counts)

    def check(self, schedule: Schedule | None, rule: Rule | None) -> None:
        """Makes sure that a training can go on with it; None leaves something unchecked.

        Raises:
          StateError: it was made with another schedule or rule.
        """
        read_header(header(self.state, self.schedule, self.config.rule), schedule, rule)

    def refuse_counts(self) -> None:
        """For adapters whose leaves all have one count.

        Raises:
          StructureError: the file has leaves with counts of their own.
        """
        if self.counts:
            raise StructureError(
                f"cannot load the saved average: {_listed(self.counts)} joined it later than the "
                "others, and here all weights have one count.",
                hint="go on in the framework that saved it, or start a new average.",
            )


def save_average(
    path: str | os.PathLike[str],
    state: SWAState,
    config: SWAConfig,
    *,
    schedule: Schedule | None = None,
    framework: str | None = None,
    extra: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    counts: Mapping[str, tuple[int, float]] | None = None,
) -> None:
    """Writes an average and all that is needed to go on with it into one safetensors file.

    The names in the file are the paths of the leaves, so that any reader of safetensors gets the
    averaged weights without knowing of this package. The file is written beside its place,
    flushed to the disk and renamed.

    Args:
      path: the file, by custom ``*.safetensors``; replaced if it is there.
      state: the counters and the average, a pytree of numpy arrays.
      config: what it was made with.
      schedule: the resolved schedule; whoever goes on is then held to it.
      framework: who saves, for people to read.
      extra: what an adapter needs beside this; plain JSON.
      beside: further arrays, kept apart from the average.
      counts: n_averaged and total of leaves that joined later than the others, by path.

    Raises:
      StructureError: two leaves have the same path, or one that is kept.
      StateError: a dtype that the format does not have.
      OSError: the file cannot be written; an older one is still there.

    >>> import tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "average.safetensors")
    >>> save_average(file, SWAState(7, 2, 0, 2.0, {"dense": {"bias": np.zeros(1)}}), SWAConfig())
    >>> load_average(file).state
    SWAState(n_updates=7, n_averaged=2, n_skipped=0, total=2.0, average={'dense/bias': array([0.])})
    """
    average = {key: leaf for key, leaf in trees.by_path(state.average).items() if leaf is not None}
    others = {_BESIDE + key: leaf for key, leaf in (beside or {}).items()}
    if both := sorted(average.keys() & others.keys()):
        raise StructureError(
            f"a leaf has the path '{both[0]}', which is kept for what stands beside an average.",
            hint="rename one of its keys.",
        )
    arrays = {key: np.asarray(leaf) for key, leaf in (average | others).items()}
    # The format has no complex numbers of two doubles.
    pairs = [key for key, array in arrays.items() if array.dtype == np.complex128]
    for key in pairs:
        arrays[key] = np.ascontiguousarray(arrays[key])[..., None].view(np.float64)
    saved = {
        **header(state, schedule, config.rule),
        "config": config.to_dict(),
        "framework": framework,
        "versions": _versions(),
        "extra": dict(extra or {}),
        "beside": sorted(others),
        "complex128": sorted(pairs),
        "counts": {key: [int(n), float(total)] for key, (n, total) in (counts or {}).items()},
    }
    # Readers for torch look for the format.
    metadata = {"format": "pt", _KEY: json.dumps(saved, allow_nan=False)}
    safetensors_files.write(path, arrays, metadata)


def load_average(path: str | os.PathLike[str]) -> AverageFile:
    """Reads a file that ``save_average`` wrote, in any framework.

    Raises:
      StateError: no such file but something else, truncated, damaged, or of a newer version.
      OSError: the file cannot be read.
    """
    name = os.path.basename(path)
    arrays, metadata = safetensors_files.read(path)
    described, saved = _described(name, metadata)
    if described is None:
        raise StateError(
            f"{name} holds arrays, but no saved average.",
            hint="load a file that save_average, or save of an adapter, has written.",
        )
    try:
        arrays |= {key: _complex(arrays[key]) for key in saved.get("complex128", [])}
        beside = {key.removeprefix(_BESIDE): arrays.pop(key) for key in saved.get("beside", [])}
        counts = {key: (int(n), float(t)) for key, (n, t) in saved.get("counts", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(name, f"its arrays are not those it describes ({error!r})") from error
    for key, array in arrays.items():
        if not trees.is_inexact(array.dtype):
            raise _damaged(name, f"array '{key}' has dtype {array.dtype}, and is no average")
    state = described.state._replace(average=arrays)
    return described._replace(state=state, beside=beside, counts=counts)


def description(name: str, metadata: Mapping[str, str]) -> AverageFile | None:
    """What the strings of a file say of its average, without the arrays; None where it is none.

    Args:
      name: of the file, for messages.
      metadata: of a safetensors file.

    Raises:
      StateError: damaged, or of a newer version.
    """
    return _described(name, metadata)[0]


def _described(name: str, metadata: Mapping[str, str]) -> tuple[AverageFile | None, dict[str, Any]]:
    if _KEY not in metadata:
        return None, {}
    try:
        saved = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its description cannot be read ({error})") from error
    counters = read_header(saved)
    try:
        config = SWAConfig.from_dict(saved.get("config"))
    except (ConfigError, TypeError) as error:
        raise _damaged(name, f"its configuration is none ({error})") from error
    versions, extra = saved.get("versions", {}), saved.get("extra", {})
    if not isinstance(versions, dict) or not isinstance(extra, dict):
        raise _damaged(name, "its description is none of an average")
    schedule = saved.get("schedule")
    described = AverageFile(
        SWAState(**counters, average={}),
        config,
        None if schedule is None else read_schedule(schedule),
        saved.get("framework"),
        versions,
        extra,
        beside={},
        counts={},
    )
    return described, saved


def _complex(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if pairs.dtype != np.float64 or pairs.shape[-1:] != (2,):
        raise ValueError(f"{pairs.dtype} of shape {pairs.shape} are no pairs of float64")
    return pairs.view(np.complex128)[..., 0]


def _listed(names: Iterable[str]) -> str:
    found = [f"'{name}'" for name in names]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if found[8:] else "") or "nothing"


def _versions() -> dict[str, str]:
    """Of what is loaded; nothing is imported for it."""
    found = {
        name: str(getattr(sys.modules[name], "__version__", "unknown"))
        for name in ("swa_core", *_LIBRARIES)
        if name in sys.modules
    }
    return {"python": platform.python_version(), **found}


def _damaged(name: str, what: str) -> StateError:
    return StateError(f"{name} is damaged: {what}.", hint="load an earlier file.")
