"""The average inside an optimizer's state dict, and out of it again.

The counters and what they were counted by stand under the key "swa", which a plain optimizer
ignores. The tensors of a parameter stand beside its other state, as ``state[id]["swa_average"]``
(and ``"swa_live"`` while the average stands in for the weights), where tools that move or shard an
optimizer's state find them - but only where the optimizer has state of its own: Adam and others
take any entry for a complete one. The rest stands under ``["swa"]["averages"]``.

torch.distributed.checkpoint keeps nothing but ``state`` and ``param_groups``, and loads only what
stands in the state of a fresh optimizer under the same keys. So for it the counters stand in the
first group that has parameters, as one string of JSON under "swa" (its parts might differ in
number), and averages without state beside them under "swa_averages". There they are believed only
from a state whose parameters have names, as that module gives them: a plain optimizer that was
handed such a group keeps it as it is, while its own training goes on. With
flatten_optimizer_state_dict=True the averages all stand in ``state``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swa_core.errors import StateError, StructureError, SwappedError
from swa_core.saving import header, read_header
from swa_torch.checkpointing import Caller
from swa_torch.cohort import Cohort, Position
from swa_torch.packed import apart
from swa_torch.running_average import RunningAverage, say_dtype
from swa_torch.sharding import like, local, shard_of

_KEYS = ("swa_average", "swa_live")
_GROUP_KEYS = ("swa", "swa_averages")
_OTHER = "load it into the model and the parameter groups it was saved with."
_EARLIER = "load an earlier checkpoint."
_FROZEN = (
    "the parameter is frozen, and torch.distributed.checkpoint loads only what a fresh optimizer "
    "has an average of: unfreeze it, load, and freeze it again."
)


class Loaded(NamedTuple):
    """A state dict that was found to fit, taken apart; nothing has been changed yet.

    Attributes:
      plain: what the wrapped optimizer is to load.
      counters: as ``swa_core.saving.read_header`` gives them; None in a plain optimizer's state.
      cohorts: the averages, in tensors of their own.
      base_rates: of the groups at the start.
      live: the weights to train on with, by position, if the state was saved while swapped.
    """

    plain: dict[str, Any]
    counters: dict[str, Any] | None
    cohorts: list[Cohort]
    base_rates: list[float | None]
    live: dict[Position, Tensor]


def pack(
    plain: dict[str, Any], average: RunningAverage, asked_by: Caller = Caller.OTHER
) -> dict[str, Any]:
    """The wrapped optimizer's state dict with the average put in; ``plain`` is not changed.

    Args:
      plain: what the wrapped optimizer saves.
      average: what to put in.
      asked_by: torch.distributed.checkpoint, or others.

    Raises:
      SwappedError: for torch.distributed.checkpoint, while the average stands in for the weights.
    """
    is_distributed = asked_by is not Caller.OTHER
    if is_distributed and average.swap is not None:
        raise SwappedError(
            "saving through torch.distributed.checkpoint while the average stands in for the "
            "weights: it has no room for both.",
            hint="leave the averaged() block first; averaged_state_dict() gives the averaged "
            "weights at any time.",
        )
    groups = [_without(group, _GROUP_KEYS) for group in plain["param_groups"]]
    ids = _ids([len(group["params"]) for group in groups])
    number = {position: place for place, position in enumerate(ids)}
    entries: dict[int, dict[str, Tensor]] = {}
    parameters: dict[int, Tensor] = {}
    for cohort in average.cohorts:
        members = zip(cohort.positions, cohort.averages, cohort.parameters, strict=True)
        for position, tensor, parameter in members:
            place = number[position]
            entries[place] = {"swa_average": apart(tensor)}
            parameters[place] = parameter
    if average.swap is not None:
        # Copies: at the end of the block the two sides change their memory, and a state that is
        # written to disk only then would name each by the other's name.
        for position, tensor in average.swap.averages.items():
            live = average.swap.live[position].detach().clone()
            entries[number[position]] = {"swa_average": tensor.detach().clone(), "swa_live": live}
    state = dict(plain["state"])
    elsewhere = {}
    for place, shards in entries.items():
        tensors = {key: like(shard, parameters[place]) for key, shard in shards.items()}
        # Of a flat state torch takes out what an optimizer has, so there nobody is misled.
        if has_state := bool(state.get(place)) or asked_by is Caller.FLATTENING:
            state[place] = {**state.get(place, {}), **tensors}
        # torch.distributed.checkpoint leaves the state of a frozen parameter out when it loads.
        is_left_out = asked_by is Caller.SAVING and not parameters[place].requires_grad
        if not has_state or is_left_out:
            elsewhere[place] = tensors
    swa: dict[str, Any] = {
        **header(average.counters(), average.schedule, average.rule),
        "cohorts": [
            {
                "n_averaged": cohort.n_averaged,
                "total": cohort.total,
                "parameters": [number[position] for position in cohort.positions],
            }
            for cohort in average.cohorts
        ],
        "swapped": average.swap is not None,
        "base_rates": [] if average.rates is None else list(average.rates.base),
    }
    if not is_distributed:
        swa["averages"] = elsewhere
        return {**plain, "state": state, "param_groups": groups, "swa": swa}
    first = next(group for group in groups if group["params"])
    # What is loaded is merged into what is here; a plain optimizer's state has nothing instead.
    first["swa"] = "" if asked_by is Caller.LOADING else json.dumps(swa)
    if elsewhere:
        first["swa_averages"] = {
            str(place): tensors["swa_average"] for place, tensors in elsewhere.items()
        }
    return {**plain, "state": state, "param_groups": groups}


def unpack(saved: Any, average: RunningAverage) -> Loaded:
    """Takes a state dict apart and checks that this training can go on with it.

    Raises:
      StateError: truncated, damaged, newer, or of another schedule or rule.
      StructureError: of other parameters.
    """
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        has_names = all(isinstance(number, str) for number in numbers)
        if has_names and "state" not in saved:
            # torch.distributed.checkpoint has lost the state that was empty on its way.
            saved = {**saved, "state": {}}
        saved["state"].items()
    except (TypeError, KeyError, AttributeError) as error:
        raise StateError(
            "this is no optimizer's state: it has no state or no parameter groups.",
            hint="load what state_dict() returned.",
        ) from error
    _check_sizes(sizes, average)
    # Numbers, or names if torch.distributed.checkpoint has had the state. One that stands in the
    # groups twice has its state at its first place.
    places = {number: place for place, number in reversed([*enumerate(numbers)])}
    beside = {
        places[number]: {key: entry[key] for key in _KEYS if key in entry}
        for number, entry in saved["state"].items()
        if isinstance(entry, Mapping) and number in places
    }
    plain = _without(saved, ("swa",))
    plain["state"] = {
        number: _without(entry, _KEYS) if isinstance(entry, Mapping) else entry
        for number, entry in saved["state"].items()
    }
    plain["param_groups"] = [_without(group, _GROUP_KEYS) for group in saved["param_groups"]]
    swa = saved.get("swa")
    if swa is None and has_names:
        swa = _from_groups(saved["param_groups"])
    if swa is None:
        return Loaded(plain, None, [], [], {})
    counters = read_header(swa, average.schedule, average.rule)
    if missing := [key for key in ("schedule", "rule") if swa.get(key) is None]:
        raise StateError(
            f"the saved average is truncated: {', '.join(missing)} missing.", hint=_EARLIER
        )
    try:
        tensors = {
            place: {**beside.get(place, {}), **entry} for place, entry in swa["averages"].items()
        }
        tensors = {**beside, **tensors}
        is_swapped = bool(swa["swapped"])
        counts = [
            (int(cohort["n_averaged"]), float(cohort["total"]), [*map(int, cohort["parameters"])])
            for cohort in swa["cohorts"]
        ]
        base_rates = [None if rate is None else float(rate) for rate in swa["base_rates"]]
    except KeyError as error:
        raise StateError(
            f"the saved average is truncated: {error.args[0]} missing.", hint=_EARLIER
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise StateError(f"the saved average is damaged: {error}.", hint=_EARLIER) from error

    ids = _ids(sizes)
    parameters = dict(average.positions())
    cohorts, live = [], {}
    for n_averaged, total, members in counts:
        positions = []
        for place in members:
            if not 0 <= place < len(ids) or ids[place] not in parameters:
                raise StateError(
                    f"the saved average is damaged: it names a parameter {place}.", hint=_EARLIER
                )
            positions.append(ids[place])
        averages = []
        for place, position in zip(members, positions, strict=True):
            found = tensors.get(place, {})
            averages.append(taken(found, "swa_average", position, parameters, average))
            if is_swapped and n_averaged:
                live[position] = taken(found, "swa_live", position, parameters, average)
        here = [parameters[position] for position in positions]
        cohorts.append(Cohort(positions, here, averages, n_averaged, total, home=average.home))
    _check_cohorts(counts, counters["n_averaged"], tensors)
    return Loaded(plain, counters, cohorts, base_rates, live)


def _check_cohorts(
    counts: list[tuple[int, float, list[int]]], n_averaged: int, tensors: Mapping[Any, Any]
) -> None:
    """Refuses counts that no training makes; the averages they tell of would be wrong silently."""
    for n, total, _ in counts:
        if not 0 <= n <= n_averaged or not (1 <= total < math.inf if n else total == 0):
            raise StateError(
                f"the saved average is damaged: a cohort has {n} of {n_averaged} snapshots and a "
                f"total of {total}.",
                hint=_EARLIER,
            )
    named = Counter(place for _, _, places in counts for place in places)
    held = [place for place, entry in tensors.items() if "swa_average" in entry]
    for place in dict.fromkeys([*named, *held]):
        if named[place] != 1:
            raise StateError(
                f"the saved average is damaged: parameter {place} belongs to {named[place]} "
                "cohorts, and should to one.",
                hint=_EARLIER,
            )


def _without(entry: Mapping[Any, Any], keys: tuple[str, ...]) -> dict[Any, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _from_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What torch.distributed.checkpoint has kept, as it stands in other states under "swa"."""
    for group in groups:
        if not group.get("swa"):
            continue
        try:
            swa = json.loads(group["swa"])
            averages = group.get("swa_averages", {})
            held = {int(place): {"swa_average": tensor} for place, tensor in averages.items()}
            return {**swa, "averages": held}
        except (TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the saved average is damaged: {error}.", hint=_EARLIER) from error
    return None


def _ids(sizes: list[int]) -> list[Position]:
    """The positions behind the ids of a state dict, which count through all groups."""
    return [Position(g, i) for g, size in enumerate(sizes) for i in range(size)]


def _check_sizes(sizes: list[int], average: RunningAverage) -> None:
    now = [len(group["params"]) for group in average.optimizer.param_groups]
    if len(sizes) != len(now):
        raise StructureError(
            f"cannot load the saved state: it has {len(sizes)} parameter groups, but this "
            f"optimizer has {len(now)}.",
            hint=_OTHER,
        )
    for place, (before, here) in enumerate(itertools.zip_longest(sizes, now)):
        if before != here:
            raise StructureError(
                f"cannot load the saved state: group {place} has {before} parameters there, but "
                f"{here} here.",
                hint=_OTHER,
            )


def taken(
    found: Mapping[str, Any],
    key: str,
    position: Position,
    parameters: dict[Position, Tensor],
    average: RunningAverage,
) -> Tensor:
    """A copy of one saved tensor, beside its parameter, if it is there and fits.

    Args:
      found: the saved tensors of a parameter.
      key: "swa_average", or "swa_live" for the weights to train on with.
      position: of the parameter in the groups.
      parameters: by position.
      average: that is to take it.

    Raises:
      StateError: it is missing.
      StructureError: of another shape, dtype or sharding.
    """
    saved, parameter = found.get(key), parameters[position]
    name = average.name(position)
    if not isinstance(saved, Tensor):
        is_frozen = not parameter.requires_grad
        raise StateError(
            f"the saved average is truncated: that of {name} is missing ('{key}').",
            hint=_FROZEN if is_frozen else _EARLIER,
        )
    if saved.shape != parameter.shape:
        raise StructureError(
            f"cannot load the saved average: {name} has shape {tuple(parameter.shape)}, but the "
            f"saved one has {tuple(saved.shape)}.",
            hint=_OTHER,
        )
    dtype = average.home.dtype_of(parameter.dtype)
    if not average.home.takes(saved.dtype, parameter.dtype):
        raise StructureError(
            f"cannot load the saved average: {name} has dtype {say_dtype(parameter.dtype)}, whose "
            f"average is kept in {say_dtype(dtype)}, but the saved one is "
            f"{say_dtype(saved.dtype)}.",
            hint=_OTHER,
        )
    shard = shard_of(saved, parameter)
    if shard is None:
        raise StructureError(
            f"cannot load the saved average: that of {name} was saved in shards of another "
            "number or kind than the parameter has here.",
            hint="save and load with torch.distributed.checkpoint, which moves shards.",
        )
    here = local(parameter)
    if key == "swa_average":
        return average.home.zeros(here).copy_(shard)
    return torch.empty_like(here, requires_grad=False).copy_(shard)
