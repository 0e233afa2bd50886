"""In torch's train step, which is eager: one foreach lerp over all averages, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swa_keras.backend import Variable
from swa_keras.in_graph import LAST_UPDATE, Counters, Micro, Plan


class Step:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @torch.no_grad()
    def __call__(
        self,
        averages: Sequence[Variable],
        variables: Sequence[Variable],
        counters: Counters,
        micro: Micro,
    ) -> None:
        if not micro.completed:
            return
        schedule, rule, nonfinite = self._plan
        update = _increment(counters.n_updates)
        if not schedule.is_snapshot(update):
            return
        new = [v.value.detach() for v in variables]
        if nonfinite == "skip" and not _all_finite(new):
            _increment(counters.n_skipped)
            return
        old = [v.value for v in averages]
        n = _increment(counters.n_averaged)
        if n == 1:
            torch._foreach_copy_(old, new)
        else:
            _mix(old, new, rule.mixing_weight(float(n)))


def _increment(counter: Variable) -> int:
    """Counts on the host, where the optimizer keeps counters: nothing waits for a device."""
    number = min(int(counter.value), LAST_UPDATE - 1) + 1
    counter.value.fill_(number)
    return number


def _mix(old: list[torch.Tensor], new: list[torch.Tensor], weight: float) -> None:
    same: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for average, value in zip(old, new, strict=True):
        if value.dtype == average.dtype:
            lists = same.setdefault(average.dtype, ([], []))
            lists[0].append(average)
            lists[1].append(value)
        else:
            # Half precision: one widened weight at a time, never all of them.
            average.lerp_(value.to(average.dtype), weight)
    for averages, values in same.values():
        torch._foreach_lerp_(averages, values, weight)


def _all_finite(new: list[torch.Tensor]) -> bool:
    found = [torch.isfinite(value).all() for value in new]
    return bool(torch.stack([flag.to(found[0].device) for flag in found]).all())
