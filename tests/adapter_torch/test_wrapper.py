"""SWA is an optimizer: schedulers, hooks, closures, scalers and copies take it for one."""

import gc
import inspect
import subprocess
import sys

import pytest
import torch
from adapter_torch.training import EVERY_OTHER, averaging, network, same, sgd, train
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from swa_core import ConfigError, StructureError, SWAWarning
from swa_torch import SWA


def test_swapping_and_batch_norm_between_updates_do_not_disturb_the_training():
    plain, (averaged, optimizer) = network(), averaging()
    for model in (plain, averaged):
        model.append(torch.nn.Dropout(0.5))
    shuffler = torch.Generator().manual_seed(1)
    data = torch.utils.data.DataLoader(
        torch.randn(20, 4), batch_size=8, shuffle=True, generator=shuffler
    )
    before = shuffler.get_state()

    def evaluate():
        with optimizer.averaged(averaged, bn_data=data):
            averaged.eval()
            averaged(torch.zeros(2, 4))
            averaged.train()

    torch.manual_seed(3)
    train(plain, sgd(plain), 10)
    torch.manual_seed(3)
    with pytest.warns(SWAWarning, match="nothing is averaged yet") as said:
        train(averaged, optimizer, 10, after=evaluate)
    assert len(said) == 1
    assert same(plain.state_dict().values(), averaged.state_dict().values())
    assert torch.equal(shuffler.get_state(), before)


def test_hooks_fire_once():
    fired = []

    def note(name):
        return lambda *args: fired.append(name)

    model, optimizer = averaging()
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_state_dict_pre_hook(note("state pre"))
    optimizer.register_state_dict_post_hook(note("state post"))
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        optimizer._patch_step_function()  # as unpickling, and wrappers of wrappers, do
        train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == [
        "global pre",
        "pre",
        "post",
        "global post",
        "state pre",
        "state post",
        "load pre",
        "load post",
    ]
    removable = optimizer.register_step_post_hook(note("again"))
    removable.remove()
    train(model, optimizer, 1)
    assert "again" not in fired


def test_profiler_is_told_of_one_step():
    model, optimizer = averaging()
    train(model, optimizer, 1)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.function_events if "Optimizer.step" in event.name]
    assert names == ["Optimizer.step#SGD.step"]


def test_whoever_steps_the_inner_optimizer_is_counted_once():
    model, optimizer = averaging()
    train(model, optimizer, 3)
    train(model, optimizer.optimizer, 3)
    assert optimizer.updates == 6
    assert optimizer.n_averaged == 2


def test_a_closure_that_raises_is_no_update():
    _, optimizer = averaging()

    def closure():
        raise KeyError("data ran out")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert optimizer.updates == 0


def test_gradient_accumulation_counts_updates():
    model, optimizer = averaging()
    for number in range(1, 13):
        model(torch.randn(8, 4)).square().mean().backward()
        if number % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.updates == 4


def test_it_is_an_optimizer_around_the_one_that_it_was_given():
    inner = sgd(network())
    optimizer = SWA(inner, EVERY_OTHER)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is inner


def test_groups_state_and_defaults_are_the_inner_ones_also_after_loading():
    model, optimizer = averaging()
    train(model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    assert optimizer.defaults is optimizer.optimizer.defaults
    optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.25
    groups, state, defaults = [dict(optimizer.param_groups[0])], {}, {"lr": 3}
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    inner = optimizer.optimizer
    assert (inner.param_groups, inner.state, inner.defaults) == (groups, state, defaults)
    assert inner.param_groups is groups


def test_zero_grad():
    model, optimizer = averaging()
    model(torch.randn(8, 4)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_abilities_of_the_inner_optimizer_are_reached():
    class Modal(torch.optim.SGD):
        mode = "train"

        def eval(self):
            self.mode = "eval"

    _, optimizer = averaging(make=lambda m: Modal(m.parameters(), lr=0.1))
    optimizer.eval()
    assert optimizer.optimizer.mode == "eval"
    assert not hasattr(optimizer, "train")
    assert not optimizer._step_supports_amp_scaling
    assert "closure" in inspect.signature(optimizer.step).parameters


def test_a_wrapper_that_is_gone_counts_no_more():
    model, optimizer = averaging()
    inner = optimizer.optimizer
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert not inner._optimizer_step_post_hooks
    assert not inner._optimizer_step_pre_hooks
    train(model, inner, 1)


def test_bad_arguments():
    model = network()
    with pytest.raises(TypeError, match=r"expected a torch\.optim.Optimizer to wrap, got Linear"):
        SWA(model[0], EVERY_OTHER)
    with pytest.raises(TypeError, match=r"got the class SGD; make one first: SGD\(model\.para"):
        SWA(torch.optim.SGD, EVERY_OTHER)
    with pytest.raises(TypeError, match="expected a SWAConfig, a mapping or the path"):
        SWA(sgd(model), 5)
    with pytest.raises(ConfigError, match="steps_per_epoch: expected a whole number"):
        SWA(sgd(model), EVERY_OTHER, steps_per_epoch=2.5)
    with pytest.raises(TypeError, match="wrapped in an SWA already"):
        SWA(SWA(sgd(model), EVERY_OTHER), EVERY_OTHER)
    with pytest.raises(StructureError, match="has no parameters"):
        SWA(torch.optim.SGD([{"params": []}], lr=0.1), EVERY_OTHER)
    with pytest.raises(ConfigError, match="total_steps"):
        SWA(sgd(model), {"start": "75%", "every": "1step"})
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        SWA(sgd(model), {"start": "2ep"})
    with pytest.raises(ConfigError, match="before the first snapshot at 20"):
        SWA(sgd(model), {"start": "20step", "every": "1step"}, total_steps=10)
    with pytest.raises(ConfigError, match="unknown key"):
        SWA(sgd(model), {"strat": "20step"})
    # Nothing was left behind on the optimizer that was refused.
    inner = sgd(model)
    with pytest.raises(ConfigError):
        SWA(inner, {"start": "2ep"})
    assert not inner._optimizer_step_post_hooks


def test_the_adapter_imports_no_other_framework():
    code = (
        "import sys, swa_torch; found = {'tensorflow', 'keras', 'jax', 'optax'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
