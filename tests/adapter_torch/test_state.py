"""Saving and loading: interrupted anywhere, a run goes on as if it had not been."""

import copy

import pytest
import torch
from adapter_torch.training import (
    EVERY_OTHER,
    averaging,
    batches,
    network,
    on_disk,
    same,
    sgd,
    train,
    values,
)

from swa_core import EMA, StateError, StructureError, SWAConfig, SWAWarning
from swa_torch import SWA

MAKERS = {
    "plain sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "momentum": sgd,
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adam capturable": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters()}, {"params": m[3].parameters(), "lr": 0.1}], lr=0.01
    ),
}


def checkpoint(model, optimizer):
    return on_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def resume(state, *args, **kwargs):
    model, optimizer = averaging(*args, **kwargs)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def stretch(model, optimizer, begin, end):
    """Updates begin + 1 to end of one training."""
    for x, y in [*batches(end)][begin:]:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def same_run(one, other):
    (model, optimizer), (other_model, other_optimizer) = one, other
    assert same(model.state_dict().values(), other_model.state_dict().values())
    for name in ("updates", "n_averaged", "n_skipped"):
        assert getattr(optimizer, name) == getattr(other_optimizer, name)
    if optimizer.n_averaged:
        assert same(optimizer.averaged_parameters, other_optimizer.averaged_parameters)


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_at_every_update_it_equals_the_uninterrupted_run(name):
    config = SWAConfig(start="3step", every="2step", rule=EMA(0.7))
    whole = averaging(config, MAKERS[name])
    stretch(*whole, 0, 9)
    for interruption in range(10):
        before = averaging(config, MAKERS[name])
        stretch(*before, 0, interruption)
        after = resume(checkpoint(*before), config, MAKERS[name])
        stretch(*after, interruption, 9)
        same_run(after, whole)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("interruption", [2, 5, 6])
def test_a_state_saved_while_swapped_in_restores_the_live_side(name, interruption):
    whole = averaging(make=MAKERS[name])
    stretch(*whole, 0, 9)
    before = averaging(make=MAKERS[name])
    stretch(*before, 0, interruption)
    before[1]._average._has_warned = True
    with before[1].averaged():
        state = checkpoint(*before)
    after = resume(state, make=MAKERS[name])
    assert same(after[0].parameters(), before[0].parameters())
    stretch(*after, interruption, 9)
    same_run(after, whole)


@pytest.mark.parametrize("name", ["plain sgd", "adam"])  # averages elsewhere, and beside the state
def test_a_state_made_while_swapped_in_may_be_written_after_the_block(name):
    model, optimizer = averaging(make=MAKERS[name])
    train(model, optimizer, 6)
    with optimizer.averaged():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    twins = resume(on_disk(state), make=MAKERS[name])
    same_run(twins, (model, optimizer))


@pytest.mark.parametrize("swapped", [False, True])
def test_averages_of_half_precision_weights_stay_float32(swapped):
    def fresh():
        weights = [torch.nn.Parameter(torch.full((3,), 128.0).bfloat16())]
        return weights, SWA(torch.optim.Adam(weights, lr=1.0), EVERY_OTHER)

    weights, optimizer = fresh()
    for update in range(8):
        with torch.no_grad():
            weights[0].fill_(128.0 + (update == 7))
        weights[0].grad = torch.zeros_like(weights[0])
        optimizer.step()
    live = values(weights)
    if swapped:
        with optimizer.averaged():
            state = on_disk(optimizer.state_dict())
    else:
        state = on_disk(optimizer.state_dict())
    others, resumed = fresh()
    resumed.load_state_dict(state)
    assert resumed.averaged_parameters[0].dtype == torch.float32
    assert same(resumed.averaged_parameters, optimizer.averaged_parameters)
    assert resumed.averaged_parameters[0].tolist() == [pytest.approx(128 + 1 / 3)] * 3
    if swapped:
        assert same(others, live)


def test_a_plain_optimizer_loads_the_state():
    for make in MAKERS.values():
        model, optimizer = averaging(make=make)
        train(model, optimizer, 6)
        twin = copy.deepcopy(model)
        plain = make(twin)
        plain.load_state_dict(checkpoint(model, optimizer)["optimizer"])
        train(model, optimizer, 3)
        train(twin, plain, 3)
        assert same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("went_through_the_wrapper", [False, True])
def test_the_state_of_a_plain_optimizer_is_taken_with_a_warning(name, went_through_the_wrapper):
    model, plain = network(), None
    if went_through_the_wrapper:
        # Then stale averages travel in the plain optimizer's state; they must not be believed.
        first = SWA(MAKERS[name](model), EVERY_OTHER)
        train(model, first, 6)
        plain = MAKERS[name](model)
        plain.load_state_dict(first.state_dict())
    plain = plain or MAKERS[name](model)
    train(model, plain, 3)
    twin = copy.deepcopy(model)
    optimizer = SWA(MAKERS[name](twin), EVERY_OTHER)
    train(twin, optimizer, 5)
    twin.load_state_dict(model.state_dict())
    with pytest.warns(SWAWarning, match="starts anew"):
        optimizer.load_state_dict(on_disk(plain.state_dict()))
    assert (optimizer.updates, optimizer.n_averaged) == (0, 0)
    assert not any("swa_average" in entry for entry in optimizer.state.values())
    train(model, plain, 4)
    train(twin, optimizer, 4)
    assert same(model.parameters(), twin.parameters())
    assert optimizer.n_averaged == 1
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert same(optimizer.averaged_parameters, trained)


def test_nothing_of_ours_stands_where_the_inner_optimizer_has_nothing():
    model, optimizer = averaging(make=MAKERS["adam"])
    state = optimizer.state_dict()
    assert state["state"] == {}
    assert len(state["swa"]["averages"]) == 6
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert all("swa_average" in entry for entry in state["state"].values())
    assert not state["swa"]["averages"]
    assert not any("swa_average" in entry for entry in optimizer.state.values())
    # What is counted are plain numbers, which no device has to be asked for.
    assert state["swa"]["n_updates"] == 1
    assert all(type(state["swa"][key]) is int for key in ("n_updates", "n_averaged", "n_skipped"))


def test_groups_that_joined_later_and_frozen_parameters_are_resumed():
    def fresh(late):
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
        weights[1].requires_grad_(False)
        optimizer = SWA(torch.optim.Adam(weights[:3], lr=0.1), EVERY_OTHER)
        if late:
            optimizer.add_param_group({"params": weights[3:]})
        return weights, optimizer

    def update(weights, optimizer, number):
        for n in range(number):
            for place, p in enumerate(weights):
                p.grad = torch.full((2,), (-1.0) ** n * (place + 1)) if p.requires_grad else None
            optimizer.step()

    weights, optimizer = fresh(late=False)
    update(weights, optimizer, 5)
    optimizer.add_param_group({"params": weights[3:]})
    update(weights, optimizer, 4)
    state = on_disk(optimizer.state_dict())
    others, resumed = fresh(late=True)
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    resumed.load_state_dict(state)
    for run, opt in ((weights, optimizer), (others, resumed)):
        update(run, opt, 3)
    assert same(optimizer.averaged_parameters, resumed.averaged_parameters)
    assert [cohort.n_averaged for cohort in resumed._average.cohorts] == [5, 4]


def test_loading_shares_no_memory_with_the_state():
    model, optimizer = averaging()
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    _, twin = averaging()
    twin.load_state_dict(state)
    kept = twin.averaged_parameters
    train(model, optimizer, 3)
    assert same(twin.averaged_parameters, kept)


def test_parameters_may_be_replaced_until_the_first_update_is_made():
    """Accelerate saves and loads, to move the state, and shards the parameters only then."""
    model, optimizer = averaging()
    optimizer.load_state_dict(on_disk(optimizer.state_dict()))
    other = network().double()
    other[0] = torch.nn.Linear(3, 6, dtype=torch.float64)
    optimizer.param_groups[0]["params"] = [*other.parameters()]
    for _ in range(6):
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert (optimizer.updates, optimizer.n_averaged) == (6, 2)
    shapes = [(average.shape, average.dtype) for average in optimizer.averaged_parameters]
    assert shapes == [(parameter.shape, torch.float64) for parameter in other.parameters()]
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    with pytest.raises(StructureError, match="has shape"):
        optimizer.state_dict()


def faulty(change):
    def changed():
        model, optimizer = averaging()
        train(model, optimizer, 6)
        state = on_disk(optimizer.state_dict())
        change(state)
        return state

    return changed


def other_parameters(make_model):
    def made():
        model = make_model()
        optimizer = SWA(sgd(model), EVERY_OTHER)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(6):
            optimizer.step()
        return on_disk(optimizer.state_dict())

    return made


def of(config):
    def made():
        model, optimizer = averaging(config)
        train(model, optimizer, 6)
        return on_disk(optimizer.state_dict())

    return made


FAULTY = {
    "nothing": (lambda: None, StateError, "no optimizer's state"),
    "no groups": (faulty(lambda s: s.pop("param_groups")), StateError, "no optimizer's state"),
    "groups of nothing": (
        faulty(lambda s: s.update(param_groups=[{}])),
        StateError,
        "no optimizer's state",
    ),
    "no counter": (faulty(lambda s: s["swa"].pop("total")), StateError, "truncated: total"),
    "no version": (faulty(lambda s: s["swa"].pop("version")), StateError, "no version"),
    "no cohorts": (faulty(lambda s: s["swa"].pop("cohorts")), StateError, "truncated: cohorts"),
    "newer": (faulty(lambda s: s["swa"].update(version=99)), StateError, "version 99"),
    "no average": (
        faulty(lambda s: s["state"][3].pop("swa_average")),
        StateError,
        "truncated: that of parameter 3 of group 0",
    ),
    "no live weights": (
        faulty(lambda s: s["swa"].update(swapped=True)),
        StateError,
        "'swa_live'",
    ),
    "a parameter 77": (
        faulty(lambda s: s["swa"]["cohorts"][0].update(parameters=[77])),
        StateError,
        "damaged: .* parameter 77",
    ),
    "no schedule": (faulty(lambda s: s["swa"].pop("schedule")), StateError, "truncated: schedule"),
    "no rule": (faulty(lambda s: s["swa"].update(rule=None)), StateError, "truncated: rule"),
    "an empty list of cohorts": (
        faulty(lambda s: s["swa"].update(cohorts=[])),
        StateError,
        "damaged: parameter 0 belongs to 0 cohorts",
    ),
    "a cohort cut short": (
        faulty(lambda s: s["swa"]["cohorts"][0]["parameters"].pop()),
        StateError,
        "damaged: parameter 5 belongs to 0 cohorts",
    ),
    "a parameter twice": (
        faulty(lambda s: s["swa"]["cohorts"].append(s["swa"]["cohorts"][0])),
        StateError,
        "damaged: parameter 0 belongs to 2 cohorts",
    ),
    "a cohort of more snapshots than there were": (
        faulty(lambda s: s["swa"]["cohorts"][0].update(n_averaged=99)),
        StateError,
        "damaged: a cohort has 99 of 2 snapshots",
    ),
    "a total that is no number": (
        faulty(lambda s: s["swa"]["cohorts"][0].update(total=float("nan"))),
        StateError,
        "damaged: .* a total of nan",
    ),
    "cohorts of numbers": (faulty(lambda s: s["swa"].update(cohorts=[3])), StateError, "damaged"),
    "averages of numbers": (
        faulty(lambda s: s["swa"].update(averages=3)),
        StateError,
        "damaged",
    ),
    "an average of integers": (
        faulty(lambda s: s["state"][0].update(swa_average=torch.zeros(6, 4, dtype=torch.int32))),
        StructureError,
        "dtype float32, .* but the saved one is int32",
    ),
    "another schedule": (
        of(SWAConfig(start="2step", every="2step")),
        StateError,
        r"schedule Schedule\(start=2",
    ),
    "another rule": (
        of(SWAConfig(start="4step", every="2step", rule=EMA(0.5))),
        StateError,
        "rule .*ema",
    ),
    "other shapes": (
        other_parameters(
            lambda: torch.nn.Sequential(
                torch.nn.Linear(4, 5),
                torch.nn.BatchNorm1d(5),
                torch.nn.Tanh(),
                torch.nn.Linear(5, 1),
            )
        ),
        StructureError,
        r"parameter 0 of group 0 has shape \(6, 4\), but the saved one has \(5, 4\)",
    ),
    "another number": (
        other_parameters(lambda: torch.nn.Linear(4, 6)),
        StructureError,
        "group 0 has 2 parameters there, but 6 here",
    ),
    "other dtypes": (
        other_parameters(lambda: network().double()),
        StructureError,
        "kept in float32, but the saved one is float64",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_states_that_do_not_fit_are_refused_with_nothing_half_done(name):
    make, error, message = FAULTY[name]
    state = make()
    whole = averaging()
    stretch(*whole, 0, 9)
    model, optimizer = averaging()
    stretch(model, optimizer, 0, 5)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    stretch(model, optimizer, 5, 9)
    same_run((model, optimizer), whole)


def test_other_groups_are_refused():
    _, optimizer = averaging(make=MAKERS["two groups"])
    _, other = averaging()
    with pytest.raises(StructureError, match="1 parameter groups, but this optimizer has 2"):
        optimizer.load_state_dict(other.state_dict())
