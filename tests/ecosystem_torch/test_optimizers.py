"""Other people's optimizers, all that timm and schedulefree have: as they would train alone."""

import copy
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types

import accelerate
import numpy as np
import pytest
import schedulefree
import torch
from adapter_torch.training import batches, network, on_disk, same, values
from torch.optim import Optimizer

from swa_core import EMA, SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="3step", every="2step", rule=EMA(0.6))
UPDATES, INTERRUPTION = 9, 5
# These import timm's models, and with them a torchvision that fits torch.
NOT_OPTIMIZERS = ("_optim_factory", "_param_groups", "optim_factory")


def timm_modules():
    """The files of timm.optim, without the rest of timm, which no CPU build of torch can import."""
    found = importlib.util.find_spec("timm")
    package = types.ModuleType("timm_optim")
    package.__path__ = [f"{place}/optim" for place in found.submodule_search_locations]
    sys.modules[package.__name__] = package
    strategy = torch.backends.opt_einsum.strategy
    for module in pkgutil.iter_modules(package.__path__, "timm_optim."):
        if module.name.partition(".")[2] not in NOT_OPTIMIZERS:
            yield importlib.import_module(module.name)
    # One of them sets this for the whole process.
    torch.backends.opt_einsum.strategy = strategy


def optimizers_of(modules, home):
    return {
        f"{home}.{name}": kind
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind.__module__[:4] == home[:4]
    }


KINDS = optimizers_of(timm_modules(), "timm") | optimizers_of([schedulefree], "schedulefree")
# What a class needs besides its defaults.
NEEDS = {
    "timm.Lars": {"lr": 0.05, "momentum": 0.9},
    "timm.SGDP": {"lr": 0.05, "momentum": 0.9},
    "timm.SGDW": {"lr": 0.05, "momentum": 0.9},
    "timm.AdafactorBigVision": {"lr": 0.01, "min_dim_size_to_factor": 2},
}


@pytest.fixture(autouse=True)
def _eager():
    # timm's Kron compiles parts of itself, by a C++ compiler.
    with torch.compiler.set_stance("force_eager"):
        yield


def made(name, wrapped, seed=0):
    """A fresh model and what trains it."""
    model, kind = network(seed), KINDS[name]
    if name == "timm.Lookahead":
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), k=2)
    else:
        optimizer = kind(model.parameters(), **NEEDS.get(name, {}))
    return model, SWA(optimizer, CONFIG) if wrapped else optimizer


def train(model, optimizer, begin, end, after=lambda: None):
    """Updates begin + 1 to end of one training, by what the optimizer says of itself."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    needs_closure = (
        inspect.signature(getattr(optimizer, "optimizer", optimizer).step)
        .parameters["closure"]
        .default
        is inspect.Parameter.empty
    )
    for x, y in [*batches(end)][begin:]:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
            return loss

        if needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        after()


def evaluated(model, optimizer):
    """The weights to evaluate with, in a pause of the training."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return values(model.parameters())


def resumed(name, wrapped, visited):
    """A training that was saved and loaded, and all the weights that it visited."""
    torch.manual_seed(5)
    model, optimizer = made(name, wrapped)
    train(model, optimizer, 0, INTERRUPTION, lambda: visited.append(values(model.parameters())))
    evaluated(model, optimizer)
    states = on_disk([model.state_dict(), optimizer.state_dict()])
    torch.manual_seed(6)
    model, optimizer = made(name, wrapped, seed=1)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(
        model, optimizer, INTERRUPTION, UPDATES, lambda: visited.append(values(model.parameters()))
    )
    return model, optimizer


def test_they_are_found():
    assert {"timm.Lamb", "timm.Lion", "timm.Lookahead", "timm.Adahessian"} <= KINDS.keys()
    assert {"schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree"} <= KINDS.keys()
    assert len(KINDS) >= 32


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", KINDS)
def test_trains_and_resumes_as_it_would_alone_and_averages_what_it_visits(name):
    visited = []
    plain, _ = resumed(name, False, [])
    model, optimizer = resumed(name, True, visited)
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert not same(visited[0], visited[-1])
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (9, 4, 0)
    expected = [np.zeros(p.shape) for p in visited[0]]
    for n, update in enumerate((3, 5, 7, 9), 1):
        share = CONFIG.rule.mixing_weight(float(n))
        seen = [p.double().numpy() for p in visited[update - 1]]
        expected = [e + share * (w - e) for e, w in zip(expected, seen, strict=True)]
    for average, value in zip(optimizer.averaged_parameters, expected, strict=True):
        np.testing.assert_allclose(average.numpy(), value, rtol=2e-6, atol=1e-6)
    # The plain optimizer takes the state, and goes on from it as this one does.
    states = [copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())]
    plain, alone = made(name, wrapped=False, seed=2)
    plain.load_state_dict(states[0])
    alone.load_state_dict(states[1])
    assert same(evaluated(plain, alone), evaluated(model, optimizer))


WITH_MODES = [name for name, kind in KINDS.items() if hasattr(kind, "eval")]


@pytest.mark.parametrize("name", WITH_MODES)
def test_evaluating_a_schedule_free_optimizer_does_not_disturb_it(name):
    results = []
    for wrapped in (False, True):
        model, optimizer = made(name, wrapped)
        seen = []
        for end in range(3, 9):
            train(model, optimizer, end - 3, end - 2)
            live = evaluated(model, optimizer)
            if wrapped and optimizer.n_averaged:
                average = optimizer.averaged_parameters
                with optimizer.averaged():
                    assert same(model.parameters(), average)
                    # Whoever evaluates changes the mode once more: of the live weights.
                    optimizer.train()
                    optimizer.eval()
                    assert same(model.parameters(), average)
                    optimizer.train()
                assert same(optimizer.averaged_parameters, average)
                optimizer.eval()
                for now, before in zip(model.parameters(), live, strict=True):
                    torch.testing.assert_close(now, before)
            elif not wrapped and end >= 5:
                for _ in range(2):
                    optimizer.train()
                    optimizer.eval()
            seen += values(model.parameters())
        results.append(seen)
    assert same(*results)


def test_wrappers_that_are_no_optimizers_are_refused_with_advice():
    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    free = schedulefree.ScheduleFreeWrapper(inner)
    with pytest.raises(TypeError, match="got ScheduleFreeWrapper; if it wraps one, wrap that one"):
        SWA(free, CONFIG)


def test_an_optimizer_that_accelerate_has_prepared_is_refused_with_advice():
    # Its step() is called at every batch, and says nowhere that it did nothing.
    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2).prepare(inner)
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer .*before accelerator.prepare\(\)"):
        SWA(prepared, CONFIG)
