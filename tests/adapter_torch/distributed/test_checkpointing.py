"""torch.distributed.checkpoint in a single process; see ``checkpoint_checks`` for several."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from adapter_torch.training import EVERY_OTHER, averaging, batches, network, same, train, values
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from swa_core import StateError, SWAConfig, SWAWarning
from swa_torch import SWA

MAKERS = {
    "plain sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "a rate in a tensor": lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.05)),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adam capturable": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
}
RATES = SWAConfig.from_dict(
    {"start": "2step", "every": "2step", "lr": {"value": 0.5, "anneal": "3step"}}
)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("config", [EVERY_OTHER, RATES], ids=["", "rates"])
def test_the_step_that_makes_state_is_no_update(name, config):
    model, optimizer = averaging(config, MAKERS[name])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.updates))
    get_optimizer_state_dict(model, optimizer)
    assert seen == [0]  # else torch does it no longer
    assert optimizer.updates == 0
    twin, other = averaging(config, MAKERS[name])
    if "adam" in name:
        # Its own step count knows no better, with or without us.
        get_optimizer_state_dict(twin, other.optimizer)
    for x, y in batches(6):
        for run, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            torch.nn.functional.mse_loss(run(x), y).backward()
            opt.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.updates == other.updates
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert same(model.parameters(), twin.parameters())
    assert same(optimizer.averaged_parameters, other.averaged_parameters)
    assert len(seen) == (13 if "adam" not in name else 7)


def test_an_update_of_a_loop_counts_whatever_its_rate_and_gradients():
    model, optimizer = averaging(make=MAKERS["adam"])
    for rate in (0.0, 0.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(closure=None)
    assert optimizer.updates == 3


def test_a_step_that_failed_inside_does_not_stop_the_count():
    model, optimizer = averaging(make=MAKERS["plain sgd"])

    def fail(*_):
        raise KeyError("ours")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError, match="ours"):
        get_optimizer_state_dict(model, optimizer)
    handle.remove()
    optimizer.param_groups[0]["lr"] = 0.05  # torch has left its 0 there
    train(model, optimizer, 4)
    assert (optimizer.updates, optimizer.n_averaged) == (4, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_kept_is_plain(name):
    model, optimizer = averaging(make=MAKERS[name])
    train(model, optimizer, 6)
    inner = copy.deepcopy(optimizer.optimizer.state_dict())
    found = get_optimizer_state_dict(model, optimizer)
    assert {*found} == {"state", "param_groups"}
    kept = json.loads(found["param_groups"][0]["swa"])
    assert (kept["n_updates"], kept["n_averaged"], kept["version"]) == (6, 2, 1)
    with_state = {name for name, entry in found["state"].items() if "swa_average" in entry}
    elsewhere = found["param_groups"][0].get("swa_averages", {})
    assert len(with_state) == len(inner["state"])
    assert len(with_state) + len(elsewhere) == 6
    # Nothing of it stands in the optimizer.
    assert "swa" not in optimizer.param_groups[0]
    set_optimizer_state_dict(model, optimizer, found)
    assert "swa" not in optimizer.param_groups[0]
    assert "swa_averages" not in optimizer.param_groups[0]
    assert not any("swa_average" in entry for entry in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_plain_optimizers_checkpoint_is_loaded_as_far_as_it_goes(tmp_path):
    model = network()
    plain = MAKERS["adam"](model)
    train(model, plain, 3)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, plain), strict=True))
    dcp.save(states, checkpoint_id=tmp_path, no_dist=True)
    twin, optimizer = averaging(make=MAKERS["adam"])
    states = dict(zip(("model", "optimizer"), get_state_dict(twin, optimizer), strict=True))
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(states, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    twin.load_state_dict(states["model"])
    set_optimizer_state_dict(twin, optimizer, states["optimizer"])
    assert (optimizer.updates, optimizer.n_averaged) == (0, 0)
    train(model, plain, 4)
    train(twin, optimizer, 4)
    assert same(model.parameters(), twin.parameters())
    assert same(optimizer.averaged_parameters, twin.parameters())


def test_what_a_plain_optimizer_was_handed_is_not_believed_later():
    first, optimizer = averaging(make=MAKERS["adam"])
    train(first, optimizer, 6)
    model = network()
    plain = MAKERS["adam"](model)
    set_optimizer_state_dict(model, plain, get_optimizer_state_dict(first, optimizer))
    assert "swa" in plain.param_groups[0]  # else there is nothing to disbelieve
    train(model, plain, 3)
    _, twin = averaging(make=MAKERS["adam"])
    with pytest.warns(SWAWarning, match="starts anew"):
        twin.load_state_dict(plain.state_dict())
    assert twin.updates == 0
    assert "swa" not in twin.param_groups[0]


DAMAGED = {
    "no json": lambda group: group.update(swa="{"),
    "no mapping": lambda group: group.update(swa="[1]"),
    "no text": lambda group: group.update(swa=3),
    "no averages": lambda group: group.update(swa_averages=[3]),
    "an average of nothing": lambda group: group["swa_averages"].pop("2"),
    "an average of nobody": lambda group: group["swa_averages"].update({"77": torch.zeros(1)}),
    "names": lambda group: group.update(swa_averages={"weight": torch.zeros(1)}),
    "of a newer version": lambda group: group.update(
        swa=json.dumps({**json.loads(group["swa"]), "version": 99})
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused_with_nothing_half_done(name):
    model, optimizer = averaging(make=MAKERS["plain sgd"])
    train(model, optimizer, 6)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    DAMAGED[name](state["param_groups"][0])
    averages = values(optimizer.averaged_parameters)
    with pytest.raises(StateError, match=r"damaged|truncated|version 99"):
        set_optimizer_state_dict(model, optimizer, state)
    assert (optimizer.updates, optimizer.n_averaged) == (6, 2)
    assert same(optimizer.averaged_parameters, averages)


def test_groups_without_parameters_and_several_optimizers():
    def fresh():
        model = network()
        some = SWA(torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.5), EVERY_OTHER)
        others = SWA(
            torch.optim.Adam([{"params": [*model[1].parameters(), *model[3].parameters()]}]),
            SWAConfig(start="1step", every="3step"),
        )
        return model, (some, others)

    def update(model, optimizers, number):
        for x, y in batches(number):
            model.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()

    model, optimizers = fresh()
    update(model, optimizers, 6)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizers))
    twin, twins = fresh()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    set_optimizer_state_dict(twin, twins, state)
    update(model, optimizers, 5)
    update(twin, twins, 5)
    assert same(model.parameters(), twin.parameters())
    for optimizer, other in zip(optimizers, twins, strict=True):
        assert (optimizer.updates, optimizer.n_averaged) == (other.updates, other.n_averaged)
        assert same(optimizer.averaged_parameters, other.averaged_parameters)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize("name", MAKERS)
def test_a_flat_state_holds_it_too(name, tmp_path):
    model, optimizer = averaging(RATES, MAKERS[name])
    train(model, optimizer, 5)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FLAT))
    assert all(
        isinstance(v, torch.Tensor | int | float | str | tuple | None) for v in state.values()
    )
    twin, other = averaging(RATES, MAKERS[name])
    template = get_optimizer_state_dict(twin, other, options=FLAT)
    assert {*template} == {*state}
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    set_optimizer_state_dict(twin, other, state, options=FLAT)
    assert (other.updates, other.n_averaged) == (5, 2)
    assert same(other.averaged_parameters, optimizer.averaged_parameters)
    assert not any("swa_average" in entry for entry in other.state.values())
    assert "swa" not in other.param_groups[0]
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert same(model.parameters(), twin.parameters())
    assert same(optimizer.averaged_parameters, other.averaged_parameters)
    # And a plain optimizer takes its part of it.
    plain_model = network()
    plain = MAKERS[name](plain_model)
    set_optimizer_state_dict(plain_model, plain, state, options=FLAT)
    assert not any("swa_average" in entry for entry in plain.state.values())
    assert "swa" not in plain.param_groups[0]


def test_a_plain_optimizers_flat_state_starts_anew():
    model = network()
    plain = MAKERS["adam"](model)
    train(model, plain, 5)
    state = get_optimizer_state_dict(model, plain, options=FLAT)
    twin, optimizer = averaging(make=MAKERS["adam"])
    train(twin, optimizer, 5)
    with pytest.warns(SWAWarning, match="starts anew"):
        set_optimizer_state_dict(twin, optimizer, state, options=FLAT)
    assert optimizer.updates == 0
    steps = [[entry["step"] for entry in opt.state.values()] for opt in (plain, optimizer)]
    assert steps[0] == steps[1]
