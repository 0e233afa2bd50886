"""The average of saved checkpoints, piece by piece, in memory that does not grow with them."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from swa_core.atomic import replacing
from swa_core.checkpoints import safetensors_format
from swa_core.checkpoints.arithmetic import accumulator, widened
from swa_core.checkpoints.digests import Digests
from swa_core.checkpoints.opening import open_checkpoint
from swa_core.checkpoints.sums import PIECE, Room, sum_of
from swa_core.checkpoints.tensors import Array, Checkpoint, Piece, Spec, Write
from swa_core.errors import StateError, StructureError
from swa_core.memory_budget import limited_to

Integers = Literal["equal", "last", "first"]
_THREADS = 2
_HINT = "average checkpoints of one model."


class Plan(NamedTuple):
    """What an average of checkpoints will read and write.

    Attributes:
      inputs: the checkpoints, the oldest first.
      weights: of each, relative to one another.
      tensors: what the result holds.
      averaged: how many tensors are averaged; the others are integers or booleans.
      bytes_read: of all inputs.
      bytes_written: of the result.
      memory: bytes that are taken at the most, beside what the process has.
    """

    inputs: list[str]
    weights: list[float]
    tensors: dict[str, Spec]
    averaged: int
    bytes_read: int
    bytes_written: int
    memory: int


def average(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    key: str | None = None,
    trust: bool = False,
    dtype: str = "float32",
    integers: Integers = "equal",
    allow_missing: bool = False,
    force: bool = False,
    hashes: bool = True,
    memory: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Averages checkpoints into one of the kind, dtypes, layout and metadata of the first.

    Every tensor is summed in float32 or wider and divided and rounded once. Nothing of a
    checkpoint is executed, and what it claims is checked against its files. Beside the result lies
    ``<out>.provenance.json``: inputs, their SHA-256, weights, versions.

    Args:
      paths: the checkpoints, the oldest first; see ``open_checkpoint`` for kinds.
      out: the result; written whole or not at all. Its name ends on ".safetensors" where it is to
        be one such file, whatever the checkpoints are.
      weights: of each checkpoint, relative to one another; equal by default.
      key: the part of each checkpoint that is averaged, where they have several ("model"); "*"
        for all of it.
      trust: also read checkpoints whose description is a pickle; see ``open_checkpoint``.
      dtype: to sum in at least, "float32" or "float64".
      integers: what becomes of tensors that are not averaged: "equal" wants the same in all,
        "last" and "first" take that of one.
      allow_missing: average a tensor over the checkpoints that have it.
      force: replace what stands at ``out``.
      hashes: whether to put SHA-256 into the provenance. The files are hashed while they are read
        to be averaged, which takes several times as long as averaging alone where they are in the
        page cache.
      memory: bytes that may be taken; see ``Plan.memory``. By default as much as it takes.
      dry_run: check everything, and write nothing.
      progress: called with the bytes read so far and in all.

    Returns:
      What was read and written.

    Raises:
      ValueError: no checkpoint, or weights that are none.
      FileExistsError: ``out`` is there already.
      StructureError: tensors differ in names, shapes or dtypes, naming them.
      StateError: a checkpoint is damaged, holds NaN or Inf, or integers that differ, naming file
        and tensor; or more memory would be taken than may be.
      OSError: a file cannot be read or written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for number in (1, 2, 6):
    ...     np.savez(folder / f"{number}.npz", w=np.float32([number, 0]))
    >>> plan = average(sorted(folder.glob("*.npz")), folder / "mean.npz")
    >>> np.load(folder / "mean.npz")["w"]
    array([3., 0.], dtype=float32)
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}')
    if integers not in ("equal", "last", "first"):
        raise ValueError(f'integers must be "equal", "last" or "first", got {integers!r}')
    shares = _weights(weights, len(paths))
    target = Path(out)
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be a number of bytes, got {memory!r}")
    with limited_to(memory) as budget, ExitStack() as stack:
        checkpoints: list[Checkpoint] = []
        for path in paths:
            checkpoint = open_checkpoint(path, key=key, trust=trust)
            stack.callback(checkpoint.close)
            if checkpoints and hasattr(checkpoint, "share_with"):
                checkpoint.share_with(checkpoints[0])
            checkpoints.append(checkpoint)
        job = _Job(checkpoints, shares, dtype, integers, allow_missing)
        if not _is_plain(checkpoints[0], target):
            budget.claim(getattr(checkpoints[0], "memory_to_write", 0), f"writing {target.name}")
        budget.claim(job.memory(), f"averaging {len(checkpoints)} checkpoints")
        plan = job.plan(budget.claimed)
        _check_target(target, plan, [file for c in checkpoints for file in c.files], force=force)
        if dry_run:
            return plan
        digests = job.digests() if hashes else None
        total = plan.bytes_read + (digests.bytes_more if digests else 0)

        def tell(done: int) -> None:
            if progress is not None:
                progress(done, total)

        with _writing(checkpoints[0], target) as write:
            write(job.pieces(digests, tell))
            found = digests.found(lambda more: tell(plan.bytes_read + more)) if digests else {}
        _write_provenance(target, checkpoints, plan, found)
    return plan


class _Job:
    """Checkpoints that were found to fit each other."""

    def __init__(
        self,
        checkpoints: list[Checkpoint],
        weights: list[float],
        dtype: str,
        integers: Integers,
        allow_missing: bool,
    ) -> None:
        self.checkpoints = checkpoints
        self.weights = weights
        self.least = dtype
        self.integers = integers
        self.tensors = checkpoints[0].tensors
        self.threads = _THREADS if all(c.is_random for c in checkpoints) else 1
        self._rooms = threading.local()
        _check_same(checkpoints, allow_missing=allow_missing)
        # Who has a tensor; all of them, unless some may be missing.
        self.holders = {
            name: [place for place, c in enumerate(checkpoints) if name in c.tensors]
            for name in self.tensors
        }
        for name, spec in self.tensors.items():
            if spec.is_averaged and sum(weights[place] for place in self.holders[name]) <= 0:
                raise StructureError(
                    f"tensor '{name}' is only in checkpoints whose weights have no sum above 0.",
                    hint=_HINT,
                )

    def plan(self, memory: int) -> Plan:
        return Plan(
            [str(c.path) for c in self.checkpoints],
            self.weights,
            dict(self.tensors),
            sum(spec.is_averaged for spec in self.tensors.values()),
            sum(s.bytes * len(self.holders[name]) for name, s in self.tensors.items()),
            sum(spec.bytes for spec in self.tensors.values()),
            memory,
        )

    def memory(self) -> int:
        """Bytes that are taken beside what the checkpoints hold open."""
        # Of each thread a sum, what is read, and that widened, of 16 bytes for each number at the
        # most; and results that wait to be written.
        pieces = 3 * self.threads + (2 * self.threads + 1)
        size = max(
            (
                min(self._step(name), spec.elements)
                * max(spec.storage.itemsize, accumulator(spec, self.least).itemsize)
                for name, spec in self.tensors.items()
            ),
            default=0,
        )
        # What a list of names, shapes and places is of each tensor, once and for all.
        return pieces * size + 1000 * len(self.tensors)

    def digests(self) -> Digests:
        """Hashes of the files, to be made while they are read."""
        is_read = [
            weight != 0 and len(c.tensors) == len(self.tensors)
            for c, weight in zip(self.checkpoints, self.weights, strict=True)
        ]
        return Digests(self.checkpoints, [*self.tensors], is_read)

    def pieces(
        self, digests: Digests | None, tell: Callable[[int], None]
    ) -> Iterator[tuple[Piece, Array]]:
        """The result, piece by piece in the order of the first checkpoint; a few ahead."""
        done = 0
        pool = ThreadPoolExecutor(self.threads)
        try:
            waiting: deque[tuple[Piece, Future[Array]]] = deque()
            for number, piece in enumerate(self._cut()):
                waiting.append((piece, pool.submit(self._averaged, piece, number, digests)))
                if len(waiting) <= self.threads:
                    continue
                done += self._size(waiting[0][0])
                yield waiting[0][0], waiting.popleft()[1].result()
                tell(done)
            for piece, result in waiting:
                done += self._size(piece)
                yield piece, result.result()
                tell(done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self) -> Iterator[Piece]:
        for name, spec in self.tensors.items():
            step = self._step(name)
            for begin in range(0, spec.elements, step):
                yield Piece(name, begin, min(begin + step, spec.elements))

    def _step(self, name: str) -> int:
        """Elements of a tensor that are averaged at once."""
        unit = max(self.checkpoints[place].stretch(name) for place in self.holders[name])
        return unit * max(1, round(PIECE / unit))

    def _size(self, piece: Piece) -> int:
        itemsize = self.tensors[piece.name].storage.itemsize
        return (piece.end - piece.begin) * itemsize * len(self.holders[piece.name])

    def _averaged(self, piece: Piece, number: int, digests: Digests | None) -> Array:
        if not hasattr(self._rooms, "room"):
            self._rooms.room = Room()

        def read(place: int, into: Array) -> Array:
            found = self._read(place, piece, into)
            if digests is not None and digests.wants(place):
                digests.add(place, number, piece.name, found)
            return found

        try:
            # What is not finite is told afterwards.
            with np.errstate(invalid="ignore", over="ignore"):
                if self.tensors[piece.name].is_averaged:
                    return self._mean(piece, read)
                return self._agreed(piece, read, digests)
        except BaseException:
            if digests is not None:
                digests.stop()
            raise

    def _mean(self, piece: Piece, read: Callable[[int, Array], Array]) -> Array:
        spec = self.tensors[piece.name]
        counted = [place for place in self.holders[piece.name] if self.weights[place]]
        dtype = accumulator(spec, self.least)
        total = sum_of(spec, dtype, piece.end - piece.begin, self._rooms.room)
        for place in counted:
            total.add(read(place, total.space()), self.weights[place])
        mean = total.mean()
        if mean is None:
            self._blame(piece, spec, counted, overflows=total.overflows())
        return mean

    def _agreed(
        self, piece: Piece, read: Callable[[int, Array], Array], digests: Digests | None
    ) -> Array:
        """What all hold, or what was chosen of it; the others are read if they are hashed."""
        holders = self.holders[piece.name]
        spec = self.tensors[piece.name]
        n = piece.end - piece.begin
        chosen = holders[-1 if self.integers == "last" else 0]
        result = np.empty(n, spec.storage)
        other = self._rooms.room.array("read", n, spec.storage)
        if self.integers == "equal":
            result = read(chosen, result)
        for place in holders:
            if self.integers != "equal":
                if place == chosen:
                    result = read(place, result)
                elif digests is not None and digests.wants(place):
                    read(place, other)
            elif place != chosen and not np.array_equal(read(place, other), result):
                a, b = (self.checkpoints[p].path.name for p in (chosen, place))
                raise StateError(
                    f"tensor '{piece.name}' of {spec.dtype} differs between {a} and {b}, and "
                    "whole numbers are not averaged.",
                    hint='say integers="last" or "first" (--integers last).',
                )
        return result

    def _read(self, place: int, piece: Piece, into: Array) -> Array:
        checkpoint = self.checkpoints[place]
        read_into: Callable[[Piece, Array], None] | None = getattr(checkpoint, "read_into", None)
        if read_into is None:
            return checkpoint.read(piece)
        read_into(piece, into)
        return into

    def _blame(self, piece: Piece, spec: Spec, counted: list[int], *, overflows: bool) -> NoReturn:
        """Names the checkpoint that made a mean NaN or Inf."""
        if overflows:
            raise StateError(
                f"the mean of tensor '{piece.name}' is too large for {spec.dtype}.",
                hint="give no negative weights: without them no mean is larger than its numbers.",
            )
        for place in counted:
            numbers = widened(
                self.checkpoints[place].read(piece), spec, accumulator(spec, "float32")
            )
            if not np.isfinite(numbers).all():
                raise StateError(
                    f"tensor '{piece.name}' of {self.checkpoints[place].path.name} holds NaN or "
                    "Inf.",
                    hint="leave that checkpoint out.",
                )
        raise StateError(
            f"the sum of tensor '{piece.name}' overflows {self.least}.",
            hint='say dtype="float64" (--dtype float64).',
        )


def _writing(first: Checkpoint, target: Path) -> AbstractContextManager[Write]:
    """A checkpoint like the first, or one file of safetensors where the name says so."""
    if _is_plain(first, target):
        return safetensors_format.writing_plainly(target, first.tensors)
    return first.writing(target)


def _is_plain(first: Checkpoint, target: Path) -> bool:
    return target.suffix == ".safetensors" and first.path.suffix != ".safetensors"


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    if not n:
        raise ValueError("there are no checkpoints to average")
    found = [1.0] * n if weights is None else [float(weight) for weight in weights]
    if len(found) != n:
        raise ValueError(f"{len(found)} weights were given for {n} checkpoints")
    # Negative ones take the beginning out of a running average.
    if not all(map(math.isfinite, found)) or sum(found) <= 0:
        raise ValueError(f"weights must be numbers with a sum above 0, got {found}")
    return found


def _check_same(checkpoints: list[Checkpoint], *, allow_missing: bool) -> None:
    """Refuses checkpoints of other tensors than the first has."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        missing = [name for name in first.tensors if name not in other.tensors]
        more = [name for name in other.tensors if name not in first.tensors]
        if more or (missing and not allow_missing):
            parts = []
            if missing:
                parts.append(f"{other.path.name} lacks {_listed(missing)}")
            if more:
                parts.append(f"{first.path.name} lacks {_listed(more)}")
            raise StructureError(
                f"the checkpoints have not the same tensors: {'; '.join(parts)}.",
                hint=f"{_HINT} allow_missing (--allow-missing) averages each tensor over those "
                "that have it; the first checkpoint has to have all.",
            )
        for name, spec in first.tensors.items():
            if name in other.tensors and other.tensors[name] != spec:
                there = other.tensors[name]
                raise StructureError(
                    f"tensor '{name}' is {spec.dtype} of shape {spec.shape} in {first.path.name}, "
                    f"and {there.dtype} of shape {there.shape} in {other.path.name}.",
                    hint=_HINT,
                )


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:5]) + (
        f" and {len(names) - 5} more" if names[5:] else ""
    )


def _check_target(target: Path, plan: Plan, inputs: list[Path], *, force: bool) -> None:
    if target.exists():
        if not force:
            raise FileExistsError(f"{target} is there already; force (--force) replaces it")
        here = target.resolve()
        if any(file.resolve().is_relative_to(here) for file in inputs):
            raise FileExistsError(f"{target} is one of the checkpoints to be averaged")
    folder = target.parent
    if folder.exists() and shutil.disk_usage(folder).free < plan.bytes_written:
        raise OSError(f"{plan.bytes_written} bytes are to be written, and {folder} has no room")


def _write_provenance(
    target: Path, checkpoints: list[Checkpoint], plan: Plan, hashes: Mapping[Path, str]
) -> None:
    from swa_core import __version__

    inputs: list[dict[str, Any]] = [
        {
            "path": str(checkpoint.path),
            "weight": weight,
            "files": {
                str(file.relative_to(checkpoint.path) if file != checkpoint.path else file.name): (
                    hashes.get(file)
                )
                for file in checkpoint.files
            },
        }
        for checkpoint, weight in zip(checkpoints, plan.weights, strict=True)
    ]
    versions = {"swa_core": __version__, "numpy": np.__version__}
    said = {"inputs": inputs, "versions": versions | {"python": platform.python_version()}}
    with replacing(target.with_name(target.name + ".provenance.json")) as file:
        file.write((json.dumps(said, indent=2) + "\n").encode())
