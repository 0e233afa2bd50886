"""Hooks, and updates that reach the optimizer by other ways than its plain step()."""

import collections
import copy
import pickle

import pytest
import torch
from adapter_torch.training import (
    EVERY_OTHER,
    averaging,
    batches,
    network,
    same,
    sgd,
    train,
    values,
)

from swa_core import LearningRate, SWAConfig, SwappedError
from swa_torch import SWA


class Clamped(torch.optim.Adam):
    """As users write it: something around the step of the base class."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.clamp_(-0.1, 0.1)
        return loss


class TwiceClamped(Clamped):
    def step(self, closure=None):
        return super().step(closure)


class Slow(torch.optim.Optimizer):
    """A wrapper of an optimizer that leaves out Optimizer.__init__, as many do."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.base.step(closure)


class Loyal(torch.optim.SGD):
    """Takes all it has along when it is copied, its hooks too."""

    def __getstate__(self):
        return self.__dict__.copy()


@pytest.mark.parametrize("stepped", ["wrapper", "inner"])
@pytest.mark.parametrize("kind", [Clamped, TwiceClamped])
def test_a_step_that_calls_the_step_of_its_base_class_is_one_update(kind, stepped):
    # Once the base class was used by itself, its step calls the hooks too.
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    lr = LearningRate(value=0.2, anneal="4step", shape="linear")
    config = SWAConfig(start="2step", every="1step", lr=lr)
    model, optimizer = averaging(config, lambda m: kind(m.parameters(), lr=0.1))
    visited, rates = [], []
    stepping = optimizer if stepped == "wrapper" else optimizer.optimizer

    def after():
        visited.append(values(model.parameters()))
        rates.append(optimizer.param_groups[0]["lr"])

    train(model, stepping, 5, after=after)
    assert (optimizer.updates, optimizer.n_averaged) == (5, 4)
    assert rates == pytest.approx([0.1, 0.1, 0.125, 0.15, 0.175])
    # The snapshots are of what the whole step left behind.
    expected = [torch.stack(seen).mean(0) for seen in zip(*visited[1:], strict=True)]
    for average, value in zip(optimizer.averaged_parameters, expected, strict=True):
        torch.testing.assert_close(average, value)
        assert average.abs().max() <= 0.1


def test_a_step_of_the_base_class_that_raises_leaves_the_count_right():
    model, optimizer = averaging(make=lambda m: Clamped(m.parameters()))

    def closure():
        raise OSError("data ran out")

    for _ in range(3):
        with pytest.raises(OSError, match="ran out"):
            optimizer.optimizer.step(closure)
    train(model, optimizer, 4)
    assert (optimizer.updates, optimizer.n_averaged) == (4, 1)


def test_optimizers_that_leave_out_the_constructor_of_their_base_are_counted():
    plain, model = network(), network()
    optimizer = SWA(Slow(sgd(model)), EVERY_OTHER)
    train(model, optimizer, 6)
    train(plain, sgd(plain), 6)
    assert same(plain.parameters(), model.parameters())
    assert (optimizer.updates, optimizer.n_averaged) == (6, 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Loyal, Clamped])
def test_copies_of_optimizers_that_take_their_hooks_along_count_once(how, kind):
    copy_of = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    model, optimizer = averaging(make=lambda m: kind(m.parameters(), lr=0.05))
    train(model, optimizer, 5)
    twin_model, twin = copy_of((model, optimizer))
    train(twin_model, twin, 3, seed=1)
    assert (optimizer.updates, twin.updates, twin.n_averaged) == (5, 8, 3)
    train(model, optimizer, 3, seed=1)
    assert same(optimizer.averaged_parameters, twin.averaged_parameters)


def test_a_step_that_raises_is_no_update_and_the_next_one_is():
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise OSError("no power")
            return super().step(closure)

    lr = LearningRate(value=0.2, anneal="4step", shape="linear")
    config = SWAConfig(start="2step", every="2step", lr=lr)
    plain, (model, optimizer) = (
        averaging(config, lambda m: Failing(m.parameters(), lr=0.1)) for _ in range(2)
    )
    train(*plain, 6)
    for x in range(6):
        optimizer.optimizer.fails = True
        with pytest.raises(OSError, match="no power"):
            optimizer.step()
        assert optimizer.updates == x
        optimizer.optimizer.fails = False
        update(model, optimizer, x)
    assert same(plain[0].parameters(), model.parameters())
    assert same(plain[1].averaged_parameters, optimizer.averaged_parameters)
    assert plain[1].n_averaged == optimizer.n_averaged == 3


def update(model, optimizer, number):
    x, y = [*batches(6)][number]
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def test_what_the_step_of_an_optimizer_takes_besides_is_passed_on():
    class Particular(torch.optim.SGD):
        def step(self, closure=None, *, loss=None):
            super().step(closure)
            return loss

    _, optimizer = averaging(make=lambda m: Particular(m.parameters(), lr=0.1))
    assert optimizer.step(loss=3.0) == 3.0
    assert optimizer.step(lambda: 1.0, loss=2.0) == 2.0
    assert optimizer.updates == 2
    with pytest.raises(TypeError, match="entropy"):
        optimizer.step(entropy=1)


def test_hooks_may_change_the_arguments_and_keep_their_order():
    _, optimizer = averaging()
    seen = []
    inner = optimizer.optimizer

    def early(opt, args, kwargs):
        assert opt is inner
        seen.append("early")
        return args, {"closure": lambda: 5.0}

    optimizer.register_step_pre_hook(early)
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.updates))
    assert optimizer.step() == 5.0
    assert seen == ["early", 1]  # a hook that is registered after the average sees it counted


def test_a_hook_from_before_the_wrapping_changes_what_is_averaged():
    model = network()
    inner = sgd(model)

    def double(opt, args, kwargs):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)

    inner.register_step_post_hook(double)
    optimizer = SWA(inner, {"start": "1step", "every": "1step"})
    train(model, optimizer, 1)
    assert same(optimizer.averaged_parameters, model.parameters())


def test_hooks_on_states_may_replace_them():
    model, optimizer = averaging()
    train(model, optimizer, 5)

    def mark(opt, state):
        return {**state, "mine": 1}

    optimizer.register_state_dict_post_hook(mark)
    state = optimizer.state_dict()
    assert state["mine"] == 1
    found = []

    def look(opt, state):
        found.append(state.pop("mine"))

    twin_model, twin = averaging()
    twin_model.load_state_dict(model.state_dict())
    twin.register_load_state_dict_pre_hook(look)
    twin.load_state_dict(copy.deepcopy(state))  # torch's loading shares memory with it
    assert found == [1]
    train(model, optimizer, 3, seed=1)
    train(twin_model, twin, 3, seed=1)
    assert same(model.parameters(), twin_model.parameters())
    assert same(optimizer.averaged_parameters, twin.averaged_parameters)


def test_two_averages_around_one_optimizer():
    model = network()
    inner = sgd(model)
    first = SWA(inner, EVERY_OTHER)
    second = SWA(inner, {"start": "2step", "every": "1step", "rule": {"name": "ema", "decay": 0.5}})
    train(model, first, 2)
    train(model, second, 2)
    assert (first.updates, second.updates) == (4, 4)
    assert (first.n_averaged, second.n_averaged) == (1, 3)
    live, averages = values(model.parameters()), second.averaged_parameters
    assert not same(averages, first.averaged_parameters)
    with second.averaged():
        assert same(model.parameters(), averages)
        assert same(second.averaged_parameters, averages)
        assert same(first.averaged_parameters, live)  # it had one snapshot, at this update
        for use in (
            first.averaged().__enter__,
            first.finalize,
            first.state_dict,
            lambda: first.load_state_dict({}),
            lambda: copy.deepcopy(first),
        ):
            with pytest.raises(SwappedError, match="another SWA around the same optimizer"):
                use()
        for stepped in (first, second, inner):
            with pytest.raises(SwappedError, match=r"step\(\)"):
                stepped.step()
    assert same(model.parameters(), live)
    assert (first.updates, second.updates) == (4, 4)
    # Both go into a checkpoint, and come out of it in either order.
    states = [first.state_dict(), second.state_dict()]
    twin = network()
    twin.load_state_dict(model.state_dict())
    twin_inner = sgd(twin)
    twins = [SWA(twin_inner, s.config) for s in (first, second)]
    for place in (1, 0):
        twins[place].load_state_dict(copy.deepcopy(states[place]))
    train(model, first, 3, seed=2)
    train(twin, twins[0], 3, seed=2)
    assert same(model.parameters(), twin.parameters())
    for one, other in zip((first, second), twins, strict=True):
        assert same(one.averaged_parameters, other.averaged_parameters)


def test_an_average_that_has_not_begun_tells_no_other_for_the_live_weights():
    model = network()
    first = SWA(sgd(model), {"start": "1step", "every": "1step"})
    second = SWA(first.optimizer, {"start": "9step", "every": "1step"})
    train(model, first, 2)
    with first.averaged(), pytest.raises(SwappedError, match=r"averaged_parameters: .*another SWA"):
        second.averaged_parameters  # noqa: B018


def test_optimizers_of_one_model_have_an_average_each():
    generator, critic = network(0), network(1)
    optimizers = [SWA(sgd(m), EVERY_OTHER) for m in (generator, critic)]
    live = {}
    for number in range(1, 8):
        for model, optimizer in zip((generator, critic), optimizers, strict=True):
            if model is critic or number % 2:  # the critic is trained twice as often
                train(model, optimizer, 1, seed=number)
                live[model] = values(model.parameters())
    assert [o.updates for o in optimizers] == [4, 7]
    assert [o.n_averaged for o in optimizers] == [1, 2]
    averages = [o.averaged_parameters for o in optimizers]
    with optimizers[0].averaged():
        train(critic, optimizers[1], 1)  # the other one goes on, also meanwhile
        with optimizers[1].averaged():
            assert same(generator.parameters(), averages[0])
    assert same(generator.parameters(), live[generator])
    assert optimizers[1].updates == 8


def test_nothing_of_it_is_left_on_the_optimizer_when_it_is_gone():
    model, optimizer = averaging()
    inner = optimizer.optimizer
    twin = copy.copy(optimizer)
    del optimizer
    train(model, inner, 2)
    assert twin.updates == 2  # the copy shares the average, and so keeps it
    del twin
    assert inner._optimizer_step_pre_hooks == inner._optimizer_step_post_hooks == {}
    assert isinstance(inner._optimizer_step_pre_hooks, collections.OrderedDict)
