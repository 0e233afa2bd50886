"""What happens at moments that nobody plans: interrupts, errors, memory that moves, other modes."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys

import pytest
import torch
from adapter_torch.training import EVERY_OTHER, averaging, network, same, train, values

from swa_core import SWAConfig
from swa_core.errors import SWAError
from swa_torch import SWA

ALWAYS = SWAConfig(start="1step", every="1step")
LARGE = 1_500_000  # more than goes through the scratch at once


def step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def around(parameters, config=ALWAYS, **options):
    return SWA(torch.optim.SGD(parameters, lr=1.0), config, **options)


@pytest.mark.parametrize("shapes", [[(100, 100)], [(8,), (8,), (8,)]], ids=["alone", "packed"])
@pytest.mark.parametrize("moment", ["before the first update", "afterwards"])
def test_what_is_allocated_in_inference_mode_serves_the_training(shapes, moment):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = around(parameters)
    if moment == "afterwards":
        step(optimizer, parameters)
    with torch.inference_mode():
        if moment == "afterwards":
            with optimizer.averaged():
                pass
        else:
            optimizer.state_dict()
    for _ in range(3):
        step(optimizer, parameters)
    with optimizer.averaged():
        pass
    assert optimizer.n_averaged == optimizer.updates
    optimizer.finalize()


def test_the_live_weights_of_parameters_that_share_memory_return():
    memory = torch.zeros(LARGE)
    parameters = [torch.nn.Parameter(memory), torch.nn.Parameter(memory)]
    optimizer = around(parameters)
    for _ in range(3):
        step(optimizer, parameters)
    live, averages = values(parameters), optimizer.averaged_parameters
    with optimizer.averaged():
        assert not same(parameters, live)
    assert same(parameters, live)
    assert same(optimizer.averaged_parameters, averages)


@pytest.mark.parametrize("how", ["to another dtype and back", "to other memory"])
def test_the_live_weights_follow_parameters_that_move_in_the_block(how):
    model, optimizer = averaging()
    train(model, optimizer, 7)
    live, averages = values(model.parameters()), optimizer.averaged_parameters
    with optimizer.averaged():
        if how == "to other memory":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        else:
            model.double().float()
        assert same(model.parameters(), averages)
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, averages)


@pytest.fixture
def heeds_interrupts():
    """Processes in the background are often started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(name, monkeypatch):
    """Lets Ctrl-C arrive in the midst of one of torch's functions, once."""
    whole = getattr(torch, name)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(torch, name, whole)
        signal.raise_signal(signal.SIGINT)
        return whole(*args, **kwargs)

    monkeypatch.setattr(torch, name, interrupted)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_waits_for_the_end_of_a_snapshot(monkeypatch):
    model, optimizer = averaging(ALWAYS)
    train(model, optimizer, 3)
    interrupting("_foreach_lerp_", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 4)
    # The first of those updates was made, and its snapshot is whole.
    assert (optimizer.updates, optimizer.n_averaged) == (4, 4)
    assert optimizer._average.total == optimizer._average.cohorts[0].total == 4.0
    train(model, optimizer, 2)
    assert optimizer.n_averaged == 6


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("side", ["in", "out"])
def test_an_interrupt_waits_for_the_end_of_a_swap(monkeypatch, side):
    model, optimizer = averaging()
    train(model, optimizer, 7)
    live, averages = values(model.parameters()), optimizer.averaged_parameters

    def block():
        if side == "in":
            interrupting("_foreach_copy_", monkeypatch)
        with optimizer.averaged():
            if side == "out":
                interrupting("_foreach_copy_", monkeypatch)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, averages)
    train(model, optimizer, 1)


def test_an_average_that_an_error_left_half_done_is_not_handed_out(monkeypatch):
    model, optimizer = averaging(ALWAYS)
    train(model, optimizer, 3)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    def failing(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_lerp_", failing)
        with pytest.raises(MemoryError):
            train(model, optimizer, 1)
    for use in (optimizer.state_dict, optimizer.finalize, lambda: optimizer.averaged_parameters):
        with pytest.raises(SWAError, match="snapshot 4 at update 4: averaging failed"):
            use()
    with pytest.raises(SWAError, match="cannot be relied on"):
        train(model, optimizer, 1)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 2)
    assert optimizer.n_averaged == 5


FORKED = """
import os, torch
from swa_torch import SWA
weight = torch.nn.Parameter(torch.zeros(4))
config = {"start": "1step", "every": "1step"}
optimizer = SWA(torch.optim.SGD([weight], lr=1.0), config, device="cpu")
optimizer._average.host.always = True
def step():
    weight.grad = torch.ones(4)
    optimizer.step()
step()
assert optimizer.n_averaged == 1
child = os.fork()
step(), step()
assert optimizer.averaged_parameters[0].tolist() == [-2.0] * 4
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both went on")
else:
    os._exit(0)
"""


def test_a_forked_process_averages_on_the_host_too():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "both went on", done.stderr


def test_averages_stand_where_they_should_whatever_the_default_device_is():
    parameters = [torch.nn.Parameter(torch.zeros(8)) for _ in range(3)]
    optimizer = around(parameters, device="cpu")
    optimizer._average.host.always = True
    with torch.device("meta"):
        for _ in range(3):
            step(optimizer, parameters)
        averages = optimizer.averaged_parameters
    assert [average.tolist() for average in averages] == [[-2.0] * 8] * 3


class Versioned(torch.nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *others):
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


def test_the_averaged_state_dict_tells_the_versions_of_modules():
    model = torch.nn.Sequential(Versioned(2, 1))
    optimizer = around(model.parameters())
    step(optimizer, [*model.parameters()])
    twin = torch.nn.Sequential(Versioned(2, 1))
    twin.load_state_dict(optimizer.averaged_state_dict(torch.compile(model, backend="eager")))
    assert same(twin.parameters(), optimizer.averaged_parameters)


def test_the_averaged_state_dict_follows_a_parameter_that_was_replaced():
    model, optimizer = averaging()
    train(model, optimizer, 7)
    average = optimizer.averaged_parameters
    new = torch.nn.Parameter(torch.full_like(model[0].weight, 99.0))
    model[0].weight = optimizer.param_groups[0]["params"][0] = new
    assert torch.equal(optimizer.averaged_state_dict(model)["0.weight"], average[0])


def test_tensors_without_elements_are_averaged_among_others():
    parameters = [
        torch.nn.Parameter(torch.zeros(0, dtype=torch.complex64)),
        *network().parameters(),
    ]
    optimizer = SWA(sgd_of(parameters), EVERY_OTHER, dtype="float64")
    for _ in range(7):
        step(optimizer, parameters)
    assert [average.shape for average in optimizer.averaged_parameters] == [
        parameter.shape for parameter in parameters
    ]
    with optimizer.averaged():
        pass


def sgd_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_warning_at_the_end_says_what_finalize_keeps():
    model, optimizer = averaging()
    train(model, optimizer, 7)

    def data():
        yield torch.ones(3, 4)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        yield torch.zeros(3, 4)

    with pytest.warns(match="stood in for them: the average now holds what was written"):
        optimizer.finalize(model, bn_data=data())
