"""Every scheduler of torch sets the rates that it sets on the optimizer alone, without a warning.

They are found, not listed: one that a later torch brings is made from the optimizer alone, and
fails here if it needs more.
"""

import copy
import inspect
import warnings

import pytest
import torch
from adapter_torch.training import averaging, batches, network, on_disk, same, train
from torch.optim import lr_scheduler, swa_utils

from swa_core import LearningRate, SWAConfig, SWAWarning, learning_rate
from swa_torch import SWA

CONFIG = SWAConfig(start="5step", every="2step")
UPDATES = 14


class Halving:
    """A factor with a state, which LambdaLR saves and loads."""

    def __init__(self):
        self.asked = 0

    def __call__(self, epoch):
        self.asked += 1
        return 0.5 ** (self.asked // 4)


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.StepLR(optimizer, 4)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


# What a class needs besides the optimizer.
MADE = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [Halving(), lambda e: 0.9**e]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 8, 9]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=20),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=6),
}
NAMES = [
    name
    for module in (lr_scheduler, swa_utils)
    for name, kind in vars(module).items()
    if inspect.isclass(kind)
    and issubclass(kind, lr_scheduler.LRScheduler)
    and not name.startswith("_")
    and name != "LRScheduler"
]
ALL = {name: MADE.get(name, getattr(lr_scheduler, name, None)) for name in dict.fromkeys(NAMES)}


def sgd_of_two(model):
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.03}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def adam_of_two(model):
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.03}]
    return torch.optim.AdamW(groups, lr=0.05)


def advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)  # never gets better
    else:
        scheduler.step()


def settings(optimizer):
    keys = ("lr", "momentum", "betas", "initial_lr")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def stretch(model, optimizer, scheduler, begin, end):
    """Updates begin + 1 to end of one training; what was set during each."""
    seen = []
    for x, y in [*batches(end)][begin:]:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        seen.append(settings(optimizer))
        advance(scheduler)
    return seen


def test_they_are_found():
    assert {"OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "SequentialLR", "SWALR"} <= ALL.keys()
    assert MADE.keys() <= ALL.keys()


@pytest.mark.parametrize("make", [sgd_of_two, adam_of_two])
@pytest.mark.parametrize("name", ALL)
def test_sets_what_it_sets_on_the_optimizer_alone(name, make):
    plain = network()
    alone = make(plain)
    expected = stretch(plain, alone, ALL[name](alone), 0, UPDATES)
    assert len({str(each) for each in expected}) > 1
    model, optimizer = averaging(CONFIG, make)
    scheduler = ALL[name](optimizer)
    assert stretch(model, optimizer, scheduler, 0, UPDATES) == expected
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert (optimizer.updates, optimizer.n_averaged) == (UPDATES, 5)


@pytest.mark.parametrize("interruption", [0, 1, 4, 7])
@pytest.mark.parametrize("name", ALL)
def test_saved_and_resumed_it_goes_on(name, interruption):
    whole, optimizer = averaging(CONFIG, sgd_of_two)
    expected = stretch(whole, optimizer, ALL[name](optimizer), 0, UPDATES)
    model, before = averaging(CONFIG, sgd_of_two)
    scheduler = ALL[name](before)
    seen = stretch(model, before, scheduler, 0, interruption)
    states = on_disk([model.state_dict(), before.state_dict()])
    clock = copy.deepcopy(scheduler.state_dict())
    model, after = averaging(CONFIG, sgd_of_two)
    scheduler = ALL[name](after)
    model.load_state_dict(states[0])
    after.load_state_dict(states[1])
    scheduler.load_state_dict(clock)
    seen += stretch(model, after, scheduler, interruption, UPDATES)
    assert seen == expected
    assert same(whole.state_dict().values(), model.state_dict().values())
    assert same(optimizer.averaged_parameters, after.averaged_parameters)


@pytest.mark.parametrize("name", ALL)
def test_our_rate_wins_from_the_start_on_and_says_so_once(name):
    lr = LearningRate(value=0.2, anneal="4step", shape="linear")
    config = SWAConfig(start="5step", every="2step", lr=lr)
    plain = network()
    alone = sgd_of_two(plain)
    before = stretch(plain, alone, ALL[name](alone), 0, 5)
    model, optimizer = averaging(config, sgd_of_two)
    scheduler = ALL[name](optimizer)
    seen, interfered = [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(UPDATES):
            seen += stretch(model, optimizer, NoClock(), number, number + 1)
            ours = settings(optimizer)
            advance(scheduler)
            interfered.append(settings(optimizer)[0]["lr"] != ours[0]["lr"])
    assert seen[:5] == before
    schedule = config.lr_schedule()
    for place in (0, 1):
        base = before[-1][place]["lr"]
        expected = [float(learning_rate(u, base, schedule)) for u in range(6, UPDATES + 1)]
        assert [each[place]["lr"] for each in seen[5:]] == expected
    # What is set after update 5 is the first to be overridden. A scheduler at rest is no matter.
    assert [w.category for w in said] == [SWAWarning] * any(interfered[4:-1])
    assert all("From update 5 on" in str(w.message) and w.filename == __file__ for w in said)


class NoClock:
    def step(self):
        pass


def test_a_scheduler_from_before_the_wrapping_goes_on():
    plain, model = network(), network()
    alone, inner = sgd_of_two(plain), sgd_of_two(model)
    expected = stretch(plain, alone, lr_scheduler.StepLR(alone, 2), 0, 6)
    scheduler = lr_scheduler.StepLR(inner, 2)
    optimizer = SWA(inner, CONFIG)
    assert stretch(model, optimizer, scheduler, 0, 6) == expected
    assert optimizer.updates == 6


def test_a_group_that_is_added_is_scheduled_too():
    model, optimizer = averaging(CONFIG)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 1)
    late = torch.nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [late], "lr": 0.4})
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2)
