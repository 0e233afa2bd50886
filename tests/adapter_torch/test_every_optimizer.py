"""Every optimizer that torch.optim has, with every switch that it has, trains as it would alone.

They are found, not listed: one that a later torch brings is tested as it is made by default.
"""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from adapter_torch.training import batches, network, on_disk, same, values
from torch.optim import Optimizer

from swa_core import EMA, SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="3step", every="2step", rule=EMA(0.6))
CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
# What a class needs besides its defaults, for itself or for one of its switches.
NEEDS = {
    "SGD": {"lr": 0.05},
    "SGD nesterov": {"lr": 0.05, "momentum": 0.9},
    "LBFGS": {"max_iter": 3, "history_size": 4},
}
MORE = {
    "SGD momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "SGD fused momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "Adam fused amsgrad": (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    "RMSprop centered momentum": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "LBFGS strong_wolfe": (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe", "max_iter": 2}),
    "Adam lr in a tensor": (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
}
# Torch itself refuses the first on a CPU, and the second on leaves; see below.
NOT_HERE = ("capturable", "differentiable")


def variants():
    """Every class, and every class with each of its switches on and each implementation chosen."""
    for name, kind in CLASSES.items():
        yield name, (kind, NEEDS.get(name, {}))
        for switch, parameter in inspect.signature(kind).parameters.items():
            if isinstance(parameter.default, bool) or switch in ("foreach", "fused"):
                key = f"{name} {switch}"
                arguments = NEEDS.get(key, NEEDS.get(name, {}))
                yield key, (kind, {**arguments, switch: not parameter.default})
    yield from MORE.items()


ALL = dict(variants())
HERE = [name for name in ALL if not set(name.split()) & set(NOT_HERE)]


def made(name, wrapped, seed=0):
    """A fresh model and what trains it."""
    kind, arguments = ALL[name]
    model = network(seed)
    if kind is torch.optim.SparseAdam:
        model = torch.nn.Sequential(torch.nn.Embedding(9, 3, sparse=True))
    parameters = [*model.parameters()]
    if kind.__name__ == "Muon":  # for matrices only
        parameters = [p for p in parameters if p.ndim == 2]
    optimizer = kind(parameters, **copy.deepcopy(arguments))
    return model, SWA(optimizer, CONFIG) if wrapped else optimizer


def train(model, optimizer, begin, end, after=lambda: None):
    """Updates begin + 1 to end of one training, every other one by a closure, all of LBFGS."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, (x, y) in enumerate([*batches(end)][begin:], begin):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            if isinstance(model[0], torch.nn.Embedding):
                loss = model((x * 4).long().abs() % 9).square().mean()
            else:
                loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        if number % 2 or isinstance(inner, torch.optim.LBFGS):
            assert optimizer.step(closure).requires_grad
        else:
            closure()
            assert optimizer.step() is None
        after()


def trained_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def equal_states(some, others):
    """Whether two states agree to the last bit."""
    if isinstance(some, torch.Tensor):
        return some.dtype == others.dtype and torch.equal(some, others)
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(equal_states(some[k], others[k]) for k in some)
    if isinstance(some, (list, tuple)):
        return len(some) == len(others) and all(map(equal_states, some, others))
    return some == others


def test_they_are_found():
    assert {"SGD", "Adam", "AdamW", "LBFGS", "SparseAdam", "Adafactor"} <= CLASSES.keys()
    assert {"Adam fused", "AdamW foreach", "SGD maximize", "Adam differentiable"} <= ALL.keys()


@pytest.mark.parametrize("name", HERE)
def test_nothing_stands_between_its_hooks_and_the_count(name):
    # What is done for optimizers whose step() calls another costs more than the count itself.
    _, optimizer = made(name, wrapped=True)
    (hook,) = optimizer.optimizer._optimizer_step_pre_hooks.values()
    assert hook.__self__ is optimizer._average


@pytest.mark.parametrize("name", HERE)
def test_trains_as_it_would_alone_and_averages_what_it_visits(name):
    plain, alone = made(name, wrapped=False)
    train(plain, alone, 0, 8)
    model, optimizer = made(name, wrapped=True)
    visited = []
    train(model, optimizer, 0, 8, lambda: visited.append(values(trained_parameters(optimizer))))
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert not same(visited[0], visited[-1])
    assert equal_states(alone.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (8, 3, 0)
    # 3, 5, 7, in float64; the first snapshot is a copy.
    expected = [np.zeros(p.shape) for p in visited[0]]
    for n, update in enumerate((3, 5, 7), 1):
        share = CONFIG.rule.mixing_weight(float(n))
        seen = [p.double().numpy() for p in visited[update - 1]]
        expected = [e + share * (w - e) for e, w in zip(expected, seen, strict=True)]
    for average, value in zip(optimizer.averaged_parameters, expected, strict=True):
        np.testing.assert_allclose(average.numpy(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_saved_and_resumed_it_is_the_uninterrupted_run(name):
    whole, optimizer = made(name, wrapped=True)
    train(whole, optimizer, 0, 8)
    for interruption in (0, 2, 5, 6):
        before, saved = made(name, wrapped=True)
        train(before, saved, 0, interruption)
        state = on_disk([before.state_dict(), saved.state_dict()])
        model, resumed = made(name, wrapped=True, seed=1)
        model.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
        train(model, resumed, interruption, 8)
        assert same(model.state_dict().values(), whole.state_dict().values())
        assert same(resumed.averaged_parameters, optimizer.averaged_parameters)
        assert equal_states(resumed.state_dict(), optimizer.state_dict())
    # The plain optimizer takes the same state, and trains on. (Loading shares memory with it.)
    state = on_disk([before.state_dict(), saved.state_dict()])
    plain, alone = made(name, wrapped=False, seed=1)
    plain.load_state_dict(state[0])
    alone.load_state_dict(state[1])
    train(plain, alone, interruption, 8)
    assert same(plain.state_dict().values(), whole.state_dict().values())


def pickled(something):
    return pickle.loads(pickle.dumps(something))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", CLASSES)
def test_copies_train_as_copies_of_it_alone(name, make_copy):
    results = []
    for wrapped in (False, True):
        model, optimizer = made(name, wrapped)
        train(model, optimizer, 0, 4)
        twin, twin_optimizer = make_copy((model, optimizer))
        try:
            train(twin, twin_optimizer, 4, 8)
        except AttributeError as error:  # LBFGS does not survive it: torch leaves half of it behind
            results.append(str(error))
            continue
        train(model, optimizer, 4, 8)
        assert same(model.state_dict().values(), twin.state_dict().values())
        results.append(values(twin.state_dict().values()))
        if wrapped:
            assert (twin_optimizer.updates, optimizer.updates) == (8, 8)
            assert same(optimizer.averaged_parameters, twin_optimizer.averaged_parameters)
    assert type(results[0]) is type(results[1])
    assert isinstance(results[0], str) == (name == "LBFGS")
    assert results[0] == results[1] if name == "LBFGS" else same(*results)


def refusal(name, wrapped):
    try:
        train(*made(name, wrapped), 0, 1)
    except (RuntimeError, ValueError, AssertionError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [name for name in ALL if name not in HERE])
def test_what_it_refuses_alone_it_refuses_so(name):
    alone = refusal(name, wrapped=False)
    assert alone is not None
    assert refusal(name, wrapped=True) == alone


@pytest.mark.parametrize("name", [name for name in ALL if "differentiable" in name])
def test_gradients_pass_through_its_updates(name):
    kind, arguments = ALL[name]
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        begin = torch.randn(3, 2, requires_grad=True)
        weight = begin.clone()
        optimizer = kind([weight], **arguments)
        averaging = SWA(optimizer, {"start": "1step", "every": "1step"}) if wrapped else None
        slope = torch.randn(3, 2, requires_grad=True)
        weight.grad = slope
        (averaging or optimizer).step()
        result = weight.detach().clone()
        (weight * torch.arange(6.0).reshape(3, 2)).sum().backward()
        results.append([result, begin.grad, slope.grad])
        if averaging is not None:
            assert same(averaging.averaged_parameters, [result])
    assert same(*results)
    assert results[0][1].any()  # of the weights before; what the slope gives, Rprop throws away
