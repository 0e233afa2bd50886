"""The average as a file that any framework reads: see ``swa_core.save_average``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from swa_core import SWAConfig, load_average, save_average
from swa_core.errors import StructureError
from swa_torch.cohort import Cohort, Position, is_averaged
from swa_torch.full_state import plain_name
from swa_torch.running_average import RunningAverage
from swa_torch.sharding import is_sharded, like
from swa_torch.state import taken

_OTHER = "pass the model whose parameters the optimizer trains."


def save(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    average: RunningAverage,
    config: SWAConfig,
) -> None:
    """Writes the average under the names of the model's parameters; see ``SWA.save_average``."""
    names = _names(model)
    values = average.values()
    arrays: dict[str, Any] = {}
    counts: dict[str, tuple[int, float]] = {}
    was_gathered = False
    for cohort in average.cohorts:
        for position, parameter in zip(cohort.positions, cohort.parameters, strict=True):
            if position not in values:
                continue  # nothing is averaged of it yet
            name = _name(names, parameter, average.name(position), "save_average()")
            whole = like(values[position].detach(), parameter)
            if is_sharded(whole):
                was_gathered = True
                whole = whole.full_tensor()  # type: ignore[attr-defined]
            arrays[name] = whole.cpu().numpy()
            if cohort.n_averaged != average.n_averaged:
                counts[name] = (cohort.n_averaged, cohort.total)
    rates = [] if average.rates is None else list(average.rates.base)
    try:
        if not was_gathered or torch.distributed.get_rank() == 0:
            save_average(
                path,
                average.counters()._replace(average=arrays),
                config,
                schedule=average.schedule,
                framework="torch",
                extra={"base_rates": rates},
                counts=counts,
            )
    finally:
        if was_gathered:
            # No rank goes on to read it before it is there.
            torch.distributed.barrier()


def load(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    average: RunningAverage,
    *,
    names: Mapping[str, str] | None,
    transform: Mapping[str, Callable[[Any], Any]] | None,
) -> None:
    """Goes on from the average in a file; see ``SWA.load_average``."""
    found = load_average(path)
    found.check(average.schedule, average.rule)
    rates = found.extra.get("base_rates", []) if found.framework == "torch" else []
    if names is not None or transform is not None:
        same = {name: name for name in found.state.average}
        found = found.renamed(same if names is None else names, transform)
    state = found.state
    own = _names(model)
    parameters = dict(average.positions())
    positions = {
        _name(own, parameter, average.name(position), "load_average()"): position
        for position, parameter in parameters.items()
        if is_averaged(parameter)
    }
    if unknown := [name for name in state.average if name not in positions]:
        raise StructureError(
            f"cannot load the saved average: the optimizer trains no parameter '{unknown[0]}'.",
            hint="pass names={...} if parameters are named otherwise in the file.",
        )
    members: dict[tuple[int, float], list[Position]] = {}
    for name, position in positions.items():
        if name in state.average:
            count = found.counts.get(name, (state.n_averaged, state.total))
            members.setdefault(count, []).append(position)
        elif state.n_averaged and parameters[position].requires_grad:
            raise StructureError(
                f"cannot load the saved average: {average.name(position)}, '{name}', is missing.",
                hint="pass names={...} if parameters are named otherwise in the file.",
            )
    held = {positions[name]: array for name, array in state.average.items()}
    cohorts = []
    for (n_averaged, total), places in members.items():
        averages = [
            taken({"swa_average": _tensor(held[place])}, "swa_average", place, parameters, average)
            for place in places
        ]
        here = [parameters[place] for place in places]
        cohorts.append(Cohort(places, here, averages, n_averaged, total, home=average.home))
    average.restore(state._replace(average=None)._asdict(), cohorts)
    if average.rates is not None:
        average.rates.load(rates)


def _names(model: torch.nn.Module) -> dict[int, str]:
    """The names of the parameters in the plain model, by ``id``."""
    return {id(p): plain_name(model, name) for name, p in model.named_parameters()}


def _name(names: Mapping[int, str], parameter: Tensor, position: str, doing: str) -> str:
    if id(parameter) not in names:
        raise StructureError(f"{doing}: {position} is no parameter of this model.", hint=_OTHER)
    return names[id(parameter)]


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)
