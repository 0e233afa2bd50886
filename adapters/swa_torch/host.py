"""Averaging on the host: weights are copied from the accelerator, and averaged while it trains."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from swa_core.errors import SWAError
from swa_core.rules import Rule
from swa_torch.cohort import Cohort
from swa_torch.finite import all_finite
from swa_torch.scratch import Scratch, laid_out


class Host:
    """Takes snapshots of weights that are elsewhere, one at a time.

    ``begin`` returns as soon as the copies are on their way: on CUDA they go by a stream of their
    own into pinned memory, and what the training stream does next waits for them there, not here.
    A thread waits for them, looks whether they are finite, and averages them. Whoever needs the
    averages or the memory of the copies asks for the ``result`` before.

    Attributes:
      always: whether weights that are on the host already go this way too, to no use but a test's.
    """

    def __init__(self) -> None:
        self.always = False
        self._copies: weakref.WeakKeyDictionary[Cohort, list[Tensor]]
        self._copies = weakref.WeakKeyDictionary()
        self._streams: dict[torch.device, Any] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[bool] | None = None
        self._doing = ""
        self._process = os.getpid()  # whose thread it is: a forked process has none of it

    def __getstate__(self) -> dict[str, Any]:
        # Streams and threads do not travel, and what waits in the copies has been averaged.
        return {"always": self.always}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.always = state["always"]

    def is_needed(self, cohorts: list[Cohort]) -> bool:
        """Whether any of the weights is not on the host."""
        return self.always or any(
            weight.device.type != "cpu" for cohort in cohorts for weight in cohort.weights()
        )

    def is_busy(self) -> bool:
        """Whether there is a result to ask for."""
        return self._pending is not None

    def begin(
        self,
        cohorts: list[Cohort],
        rule: Rule,
        scratch: Scratch,
        doing: str,
        agreed: Callable[[bool], bool] | None,
    ) -> None:
        """The weights as they are now will join the averages, if they are finite.

        Args:
          cohorts: what to average; theirs alone until there is a result.
          rule: how much the snapshot weighs.
          scratch: for the thread alone until then, too.
          doing: what is done, for the message of an error.
          agreed: what all ranks say, by what this one says of whether its weights are finite; None
            to average whatever there is. It may have to be asked in this thread; then the copies
            are waited for.
        """
        assert self._pending is None
        self._doing = doing
        wait = self._copy(cohorts)
        snapshot = [(cohort, self.room(cohort)) for cohort in cohorts]

        def look() -> bool:
            wait()
            return all_finite(_to_check(snapshot, scratch))

        def mix() -> bool:
            wait()
            # A thread has a mode of its own.
            with torch.no_grad():
                for cohort, weights in snapshot:
                    cohort.add_snapshot(rule, scratch, weights)
            return True

        if agreed is None:
            self._pending = self._do(mix)
        elif not any(cohort.is_sharded for cohort in cohorts):
            self._pending = self._do(lambda: look() and mix())
        elif agreed(self._do(look).result()):
            self._pending = self._do(mix)
        else:
            self._pending = self._do(lambda: False)

    def result(self) -> bool:
        """Waits for the snapshot that was begun. Whether it was finite, and so was averaged.

        Raises:
          SWAError: it failed. As the averages may be half done, this is raised again each time.
        """
        assert self._pending is not None
        if self._process != os.getpid():
            raise SWAError(
                f"{self._doing}: this process was forked while that was averaged on the host, by a "
                "thread that it does not have.",
                hint="read the average before the fork, or load a checkpoint after it.",
            )
        try:
            was_finite = self._pending.result()
        except Exception as error:
            raise SWAError(
                f"{self._doing}: averaging on the host failed ({type(error).__name__}: {error}), "
                "so the average cannot be relied on.",
                hint="load an earlier checkpoint.",
            ) from error
        self._pending = None
        return was_finite

    def drop(self) -> None:
        """Waits until nobody works on the averages any more, and forgets what came of it."""
        if self._pending is not None and self._process == os.getpid():
            self._pending.exception()
        self._pending = None

    def room(self, cohort: Cohort) -> list[Tensor]:
        """Host memory for copies of the weights in their layout; what is in there is lost."""
        if cohort not in self._copies:
            self._copies[cohort] = _room_for(cohort.weights())
        return self._copies[cohort]

    def _do(self, job: Callable[[], bool]) -> Future[bool]:
        if self._thread is None or self._process != os.getpid():
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="swa_torch")
            self._process = os.getpid()
        return self._thread.submit(job)

    def _copy(self, cohorts: list[Cohort]) -> Callable[[], None]:
        """Starts the copies, and returns what waits for them."""
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for cohort in cohorts:
            for room, weight in zip(self.room(cohort), cohort.weights(), strict=True):
                rooms, weights = by_device.setdefault(weight.device, ([], []))
                rooms.append(room)
                weights.append(weight.detach())
        events = []
        for device, (rooms, weights) in by_device.items():
            if device.type == "cuda":
                events.append(self._copy_aside(device, rooms, weights))
            else:
                torch._foreach_copy_(rooms, weights)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def _copy_aside(self, device: torch.device, rooms: list[Tensor], weights: list[Tensor]) -> Any:
        """Starts copies on a stream of their own. Returns the event of their end."""
        training = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside = self._streams[device]
        aside.wait_stream(training)
        with torch.cuda.stream(aside):
            torch._foreach_copy_(rooms, weights, non_blocking=True)
            # The thread that waits for it sleeps meanwhile.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            aside.record_event(copied)
        for weight in weights:
            weight.record_stream(aside)
        # Whoever changes the weights next, an optimizer or anybody, does so after the copies.
        training.wait_event(copied)
        return copied


def _to_check(snapshot: list[tuple[Cohort, list[Tensor]]], scratch: Scratch) -> Iterator[Tensor]:
    for cohort, weights in snapshot:
        yield from cohort.to_check(scratch, weights)


def _room_for(weights: list[Tensor]) -> list[Tensor]:
    """Room for copies of weights: one row for each dtype, pinned where CUDA copies into it."""
    rows: dict[torch.dtype, int] = {}
    for weight in weights:
        rows[weight.dtype] = rows.get(weight.dtype, 0) + weight.numel()
    pinned = any(weight.device.type == "cuda" for weight in weights)
    with torch.inference_mode(False):  # it outlives the block
        whole = {
            dtype: torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)
            for dtype, size in rows.items()
        }
    used = dict.fromkeys(rows, 0)
    room = []
    for weight in weights:
        start, end = used[weight.dtype], used[weight.dtype] + weight.numel()
        room.append(laid_out(whole[weight.dtype][start:end], weight))
        used[weight.dtype] = end
    return room
