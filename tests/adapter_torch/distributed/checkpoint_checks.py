"""Saved by torch.distributed.checkpoint on some ranks, and gone on with on others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adapter_torch.distributed.training import (
    CONFIG,
    adam,
    averaging,
    network,
    plain_sgd,
    same,
    sgd,
    sharded,
    train,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from swa_core import SWAConfig, SWAWarning
from swa_core.errors import StateError, StructureError, SwappedError
from swa_torch import SWA

MAKERS = {"sgd": plain_sgd, "momentum": sgd, "adam": adam}
RATES = SWAConfig.from_dict(
    {
        "start": "2step",
        "every": "2step",
        "rule": {"name": "ema", "decay": 0.75},
        "lr": {"value": 0.03125, "anneal": "4step"},
    }
)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    model: torch.nn.Module, optimizer: SWA, where: Path, options: StateDictOptions | None = None
) -> None:
    states = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=where)


def load(
    model: torch.nn.Module, optimizer: SWA, where: Path, options: StateDictOptions | None = None
) -> None:
    found = get_state_dict(model, optimizer, options=options)
    states = dict(zip(("model", "optimizer"), found, strict=True))
    dcp.load(states, checkpoint_id=where)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=options,
    )


def by_hand(model: torch.nn.Module, optimizer: SWA, begin: int, end: int) -> None:
    """Updates whose gradients are the same on any number of ranks: nothing is summed."""
    for update in range(begin, end):
        for place, parameter in enumerate(model.parameters()):
            gradient = (-1.0) ** (update * place) * (place + 1 + update % 3) / 8
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


def told(model: torch.nn.Module, optimizer: SWA) -> dict[str, Any]:
    """All of a training that must survive: whole tensors and counters."""
    return {
        "weights": whole(model.parameters()),
        "averages": whole(optimizer.averaged_parameters),
        "counters": [optimizer.updates, optimizer.n_averaged, optimizer.n_skipped],
        "totals": [(cohort.n_averaged, cohort.total) for cohort in optimizer._average.cohorts],
        "rates": [group["lr"] for group in optimizer.param_groups],
        "base": None if optimizer._average.rates is None else optimizer._average.rates.base,
    }


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in one.items():
        if key in ("weights", "averages"):
            assert same(value, other[key]), key
        else:
            assert value == other[key], (key, value, other[key])


def write(name: str, folder: Path, value: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(value, folder / name)


def read(name: str, folder: Path) -> Any:
    return torch.load(folder / name, weights_only=True)


# Where sharding is what a single process has, its weights are plain, as on a laptop.
def made(name: str, config: SWAConfig = RATES) -> tuple[torch.nn.Module, SWA]:
    model = sharded() if dist.get_world_size() > 1 else network()
    return model, averaging(model, MAKERS[name], config)


def check_saved_on_two_ranks(folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        by_hand(model, optimizer, 0, 5)
        save(model, optimizer, folder / name)
        save(model, optimizer, folder / f"{name}-flat", FLAT)
        write(f"{name}-5.pt", folder, told(model, optimizer))
        by_hand(model, optimizer, 5, 9)
        write(f"{name}-9.pt", folder, told(model, optimizer))


def check_loaded_and_gone_on_with(folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        by_hand(model, optimizer, 0, 3 if name == "momentum" else 0)  # to be forgotten
        load(model, optimizer, folder / name)
        agree(told(model, optimizer), read(f"{name}-5.pt", folder))
        assert {a.dtype for a in optimizer.averaged_parameters} == {torch.float32}
        by_hand(model, optimizer, 5, 9)
        agree(told(model, optimizer), read(f"{name}-9.pt", folder))


def check_a_flat_state_loaded_into_a_fresh_optimizer(folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        load(model, optimizer, folder / f"{name}-flat", FLAT)
        agree(told(model, optimizer), read(f"{name}-5.pt", folder))
        by_hand(model, optimizer, 5, 9)
        agree(told(model, optimizer), read(f"{name}-9.pt", folder))


def check_interrupted_before_a_snapshot_and_after(folder: Path) -> None:
    """With real gradients, on as many ranks: it equals the uninterrupted run bit for bit."""
    # Adam counts torch's step before its first one as one of its own, with or without us.
    for name, interruptions in (("sgd", (0, 3)), ("adam", (1, 4))):
        model, optimizer = made(name)
        train(model, optimizer, 0, 6)
        expected = told(model, optimizer)
        for interruption in interruptions:
            before = made(name)
            train(*before, 0, interruption)
            before[1]._average._has_warned = True
            save(*before, folder / f"interrupted-{name}-{interruption}")
            after = made(name)
            load(*after, folder / f"interrupted-{name}-{interruption}")
            train(*after, interruption, 6)
            agree(told(*after), expected)


def check_phantom_steps_do_not_count(folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        get_optimizer_state_dict(model, optimizer)
        assert calls, "torch does it no longer: what this is about is gone"
        assert (optimizer.updates, optimizer.n_averaged) == (0, 0)
        assert optimizer._average.rates.base == []
        for update in range(6):
            train(model, optimizer, update, update + 1)
            optimizer.zero_grad()
            rate = optimizer.param_groups[0]["lr"]
            get_optimizer_state_dict(model, optimizer)
            assert optimizer.updates == update + 1
            assert optimizer.param_groups[0]["lr"] == rate
        # Plain SGD has no state ever, so torch does it at every call.
        assert len(calls) == (13 if name == "sgd" else 7)
        assert optimizer.n_averaged == 3
        twin_model, twin = made(name)
        if name != "adam":  # whose own step count torch's phantom advances
            train(twin_model, twin, 0, 6)
            agree(told(model, optimizer), told(twin_model, twin))


def check_a_warm_up_from_zero_counts(folder: Path) -> None:
    """A first update with a rate of 0, no state and gradients of 0 is one if the loop makes it."""
    model = sharded()
    optimizer = averaging(model, adam)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: update / 4)
    for update in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert update or optimizer.param_groups[0]["lr"] == 0.0
        assert update or not optimizer.state
        optimizer.step(closure=None)
        scheduler.step()
    assert (optimizer.updates, optimizer.n_averaged) == (3, 1)


def check_full_states(folder: Path) -> None:
    """Gathered on every rank, or on the first one and sent from there."""
    for name in MAKERS:
        model, optimizer = made(name)
        train(model, optimizer, 0, 5)
        expected = told(model, optimizer)
        weights = get_model_state_dict(model)
        weights = {key: value.clone() for key, value in weights.items()}
        ends = []
        for options in (
            StateDictOptions(full_state_dict=True),
            StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
        ):
            # Torch hands out the step counts themselves, which two optimizers would share.
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            if state:
                assert not any(isinstance(t, DTensor) for t in tensors(state))
            twin_model, twin = made(name)
            twin_model.load_state_dict(weights)
            set_optimizer_state_dict(twin_model, twin, state, options=options)
            agree(told(twin_model, twin), expected)
            train(twin_model, twin, 5, 7)
            ends.append(told(twin_model, twin))
        train(model, optimizer, 5, 7)
        for end in ends:
            agree(end, told(model, optimizer))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for entry in inner for tensor in tensors(entry)]


def check_half_precision_averages_stay_wide(folder: Path) -> None:
    for make in (plain_sgd, adam):

        def fresh(make=make):
            model = sharded().bfloat16()
            return model, averaging(model, make)

        model, optimizer = fresh()
        by_hand(model, optimizer, 0, 6)
        expected = told(model, optimizer)
        assert any((t.bfloat16() != t).any() for t in expected["averages"])
        where = folder / f"half-{make.__name__}"
        save(model, optimizer, where)
        twins = fresh()
        load(*twins, where)
        agree(told(*twins), expected)
        by_hand(model, optimizer, 6, 8)
        by_hand(*twins, 6, 8)
        agree(told(*twins), told(model, optimizer))


def check_frozen_and_late_parameters(folder: Path) -> None:
    """Cohorts of their own count, and an average that is kept while its parameter is frozen."""

    def fresh(late: bool) -> tuple[torch.nn.Module, SWA]:
        model = sharded()
        optimizer = SWA(torch.optim.Adam([*model.parameters()][:4], lr=0.01), CONFIG)
        if late:
            add(model, optimizer)
        return model, optimizer

    def add(model: torch.nn.Module, optimizer: SWA) -> None:
        optimizer.add_param_group({"params": [*model.parameters()][4:], "lr": 0.5})
        model[2].weight.requires_grad_(False)

    model, optimizer = fresh(late=False)
    train(model, optimizer, 0, 3)
    add(model, optimizer)
    train(model, optimizer, 3, 5)
    expected = told(model, optimizer)
    assert [n for n, _ in expected["totals"]] == [2, 1]
    where = folder / "late"
    save(model, optimizer, where)
    twins = fresh(late=True)
    # A checkpoint is loaded into what is there, and of a frozen parameter there is no average.
    with pytest.raises(StateError, match="unfreeze it, load"):
        load(*twins, where)
    twins = fresh(late=True)
    twins[0][2].weight.requires_grad_(True)
    load(*twins, where)
    twins[0][2].weight.requires_grad_(False)
    agree(told(*twins), expected)
    # A whole state is taken as it is.
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    others = fresh(late=True)
    others[0].load_state_dict(model.state_dict())
    set_optimizer_state_dict(*others, state, options=options)
    agree(told(*others), expected)
    train(model, optimizer, 5, 8)
    train(*twins, 5, 8)
    agree(told(*twins), told(model, optimizer))


def check_a_plain_optimizer_and_the_wrapper_exchange_states(folder: Path) -> None:
    model, optimizer = made("adam", CONFIG)
    train(model, optimizer, 0, 4)
    save(model, optimizer, folder / "of the wrapper")
    plain_model = sharded()
    plain = adam(plain_model)
    load(plain_model, plain, folder / "of the wrapper")  # type: ignore[arg-type]
    assert "swa" not in plain.param_groups[0]
    train(plain_model, plain, 4, 6)  # type: ignore[arg-type]
    train(model, optimizer, 4, 6)
    assert same(whole(plain_model.parameters()), whole(model.parameters()))
    # The other way round through the full state, which needs no average to be loaded into.
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(plain_model, plain, options=options))
    twin_model, twin = made("adam", CONFIG)
    train(twin_model, twin, 0, 3)
    twin_model.load_state_dict(plain_model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SWAWarning)
        set_optimizer_state_dict(twin_model, twin, state, options=options)
    assert ["starts anew" in str(w.message) for w in caught if w.category is SWAWarning] == [True]
    assert (twin.updates, twin.n_averaged) == (0, 0)
    train(twin_model, twin, 6, 8)
    train(plain_model, plain, 6, 8)  # type: ignore[arg-type]
    assert same(whole(plain_model.parameters()), whole(twin_model.parameters()))
    assert twin.n_averaged == 1


def check_saving_inside_averaged_is_refused(folder: Path) -> None:
    for name in ("sgd", "adam"):
        model, optimizer = made(name)
        train(model, optimizer, 0, 4)
        optimizer.zero_grad()
        live, rate = whole(model.parameters()), optimizer.param_groups[0]["lr"]
        refused = pytest.raises(SwappedError, match="leave the averaged")
        with optimizer.averaged(model), refused:
            get_optimizer_state_dict(model, optimizer)
        assert same(whole(model.parameters()), live)
        assert optimizer.param_groups[0]["lr"] == rate
        train(model, optimizer, 4, 6)


def check_a_state_of_one_rank_is_its_own(folder: Path) -> None:
    """Without torch.distributed.checkpoint, each rank saves and loads its shards."""
    model, optimizer = made("adam")
    train(model, optimizer, 0, 5)
    twins = made("adam")
    with optimizer.averaged(model):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / f"own-{dist.get_rank()}.pt")
    state = torch.load(folder / f"own-{dist.get_rank()}.pt", weights_only=True)
    twins[0].load_state_dict(state["model"])
    twins[1].load_state_dict(state["optimizer"])
    agree(told(*twins), told(model, optimizer))


def check_states_that_moved_by_themselves(folder: Path) -> None:
    """Whole averages are cut where they are loaded; shards go nowhere without being moved."""
    whole_model = network()
    one = averaging(whole_model, plain_sgd)
    by_hand(whole_model, one, 0, 5)
    model, optimizer = made("sgd", CONFIG)
    model.load_state_dict(get_model_state_dict(sharded()))
    optimizer.load_state_dict(one.state_dict())
    assert same(whole(optimizer.averaged_parameters), one.averaged_parameters)
    assert all(isinstance(average, DTensor) for average in optimizer.averaged_parameters)
    before = one.averaged_parameters
    with pytest.raises(StructureError, match="in shards of another"):
        one.load_state_dict(optimizer.state_dict())
    assert same(one.averaged_parameters, before)


SAVING = {"check_saved_on_two_ranks": check_saved_on_two_ranks}
LOADING: dict[str, Callable[[Path], None]] = {
    "check_loaded_and_gone_on_with": check_loaded_and_gone_on_with,
    "check_a_flat_state_loaded_into_a_fresh_optimizer": (
        check_a_flat_state_loaded_into_a_fresh_optimizer
    ),
}
CHECKS = {
    name: value
    for name, value in globals().items()
    if name.startswith("check_") and name not in {**SAVING, **LOADING}
}
