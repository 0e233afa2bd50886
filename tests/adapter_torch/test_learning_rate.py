"""The learning rate of [swa.lr], set on the groups of the wrapped optimizer."""

import io
import warnings

import pytest
import torch
from adapter_torch.training import averaging, batches, network, same, sgd, train
from torch.optim import lr_scheduler

from swa_core import ConfigError, LearningRate, SWAConfig, SWAWarning, learning_rate
from swa_torch import SWA

LINEAR = LearningRate(value=0.01, anneal="3step", shape="linear")
COSINE = LearningRate(value=0.2, anneal="4step")
CYCLIC = LearningRate(value=0.08, cycle="2step", low=0.01)
CONSTANT = LearningRate(value=0.3)


def config(lr):
    return SWAConfig(start="4step", every="2step", lr=lr)


def two_groups(model):
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    return torch.optim.SGD(groups, lr=0.05)


def rates_that_made_updates(model, optimizer, updates, seed=7):
    """The rate of each group during each update."""
    seen = []
    handle = optimizer.register_step_post_hook(
        lambda opt, *args: seen.append([float(group["lr"]) for group in opt.param_groups])
    )
    train(model, optimizer, updates, seed)
    handle.remove()
    return seen


@pytest.mark.parametrize("lr", [LINEAR, COSINE, CYCLIC, CONSTANT])
@pytest.mark.parametrize("stepped", ["wrapper", "inner"])
def test_each_group_departs_from_its_own_rate(lr, stepped):
    model, optimizer = averaging(config(lr), two_groups)
    opt = optimizer if stepped == "wrapper" else optimizer.optimizer
    seen = rates_that_made_updates(model, opt, 12)
    schedule = config(lr).lr_schedule()
    expected = [
        [float(learning_rate(update, base, schedule)) for base in (0.05, 0.5)]
        for update in range(1, 13)
    ]
    assert seen == expected
    assert seen[3] == [0.05, 0.5]
    assert seen[-1] != [0.05, 0.5]


def test_without_lr_the_rates_are_left_alone():
    model, optimizer = averaging()
    optimizer.param_groups[0]["lr"] = 1
    train(model, optimizer, 6)
    assert optimizer.param_groups[0]["lr"] == 1
    assert isinstance(optimizer.param_groups[0]["lr"], int)


@pytest.mark.parametrize("lr", [LINEAR, COSINE, CYCLIC])
def test_resumed_at_every_update_it_equals_the_uninterrupted_run(lr):
    whole, optimizer = averaging(config(lr), two_groups)
    train(whole, optimizer, 5)
    train(whole, optimizer, 5)
    for interruption in range(11):
        model, before = averaging(config(lr), two_groups)
        train(model, before, min(interruption, 5))
        train(model, before, max(interruption - 5, 0))
        file = io.BytesIO()
        torch.save([model.state_dict(), before.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        model, after = averaging(config(lr), two_groups)
        model.load_state_dict(weights)
        after.load_state_dict(state)
        # The batches from the interruption on.
        stretch(model, after, interruption, 10)
        assert same(model.state_dict().values(), whole.state_dict().values())
        assert same(after.averaged_parameters, optimizer.averaged_parameters)


def stretch(model, optimizer, begin, end):
    data = [*batches(5), *batches(5)]
    for x, y in data[begin:end]:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make", [lambda o: lr_scheduler.ExponentialLR(o, 0.9), lambda o: lr_scheduler.StepLR(o, 6)]
)
def test_ours_wins_over_a_scheduler_from_the_start_on_and_says_so_once(make):
    model, optimizer = averaging(config(LINEAR))
    scheduler = make(optimizer)
    seen = []
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    plain = make(sgd(network()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SWAWarning)
        warnings.simplefilter("ignore", UserWarning)
        expected = []
        for _ in range(4):
            expected.append(plain.get_last_lr()[0])
            plain.step()
    with pytest.warns(SWAWarning, match="From update 4 on") as said:
        train(model, optimizer, 12, after=scheduler.step)
    assert seen[:4] == expected
    base = expected[3]
    schedule = config(LINEAR).lr_schedule()
    assert seen[4:] == [float(learning_rate(u, base, schedule)) for u in range(5, 13)]
    assert len(said) == 1


def test_a_scheduler_that_rests_is_not_complained_of():
    model, optimizer = averaging(config(LINEAR))
    train(model, optimizer, 12)  # a warning would be an error


def test_two_averages_that_set_one_rate_do_not_complain_of_each_other():
    model, optimizer = averaging(config(COSINE), two_groups)
    twin = SWA(optimizer.optimizer, config(COSINE))
    alone = averaging(config(COSINE), two_groups)
    seen = rates_that_made_updates(model, twin, 10)  # a warning would be an error
    assert seen == rates_that_made_updates(*alone, 10)


def test_two_averages_that_set_different_rates_say_so():
    model, optimizer = averaging(config(COSINE))
    SWA(optimizer.optimizer, config(LINEAR))  # is gone at once, and sets nothing
    other = SWA(optimizer.optimizer, config(LINEAR))
    with pytest.warns(SWAWarning, match="something else sets the learning rate") as said:
        seen = rates_that_made_updates(model, optimizer, 10)
    assert len(said) == 2  # each of the other
    assert seen[-1] == [0.01]
    assert other.n_averaged == optimizer.n_averaged == 4


def test_rates_in_tensors_are_changed_in_place():
    rate = torch.tensor(0.05)
    model, optimizer = averaging(
        config(LINEAR), lambda m: torch.optim.Adam(m.parameters(), lr=rate, capturable=False)
    )
    train(model, optimizer, 12)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)


def test_a_group_that_was_added_after_the_start_departs_from_its_own_rate():
    model, optimizer = averaging(config(CYCLIC))
    train(model, optimizer, 6)
    late = torch.nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [late], "lr": 0.7})
    train(model, optimizer, 1)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]


def test_an_optimizer_without_a_rate_is_refused():
    class Free(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    with pytest.raises(ConfigError, match=r"swa\.lr: Free has no learning rate to set"):
        SWA(Free(network().parameters()), config(LINEAR))
    SWA(Free(network().parameters()), config(None)).step()
