"""Where averages live and how wide they are: device= and dtype=.

There is no accelerator here. What goes between the weights and the averages on the host (copies
put aside, a thread that averages them, waiting for it, its errors) runs on copies of weights that
are on the host already; streams, events and pinned memory do not.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from adapter_torch.test_storage import Scribble, parameters, peak
from adapter_torch.training import averaging, batches, network, same, sgd, train, values
from drivers.torch_driver import TorchDriver

from swa_core import (
    EMA,
    NothingAveragedError,
    StructureError,
    SWAConfig,
    SWAError,
    SwappedError,
    Uniform,
)
from swa_core.testing.running import checks_of
from swa_torch import SWA
from swa_torch.cohort import Cohort

EACH = SWAConfig(start="1step", every="1step")


def aside(optimizer):
    """Makes an optimizer copy weights aside although they are on the host."""
    optimizer._average.host.always = True
    return optimizer


# dtype=


def visited(weights, optimizer, updates):
    """Trains with random weights; returns these in float64."""
    seen = []
    for _ in range(updates):
        optimizer.step()
        seen.append(
            [w.detach().to(torch.complex128 if w.is_complex() else torch.float64) for w in weights]
        )
    return seen


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
@pytest.mark.parametrize("rule", [Uniform(), EMA(0.9)])
def test_float64_averages_are_as_good_as_float64(dtype, rule):
    weights = parameters()
    config = SWAConfig(start="1step", every="1step", rule=rule)
    optimizer = SWA(Scribble(weights), config, dtype=dtype)
    seen = visited(weights, optimizer, 8)
    shares = np.array([rule.mixing_weight(float(n)) for n in range(1, 9)])
    for place, average in enumerate(optimizer.averaged_parameters):
        assert average.dtype in (torch.float64, torch.complex128)
        expected = seen[0][place].clone()
        for share, at in zip(shares[1:], seen[1:], strict=True):
            expected += share * (at[place] - expected)
        torch.testing.assert_close(average, expected, rtol=1e-14, atol=1e-15)


def test_float64_averages_swap_and_are_kept():
    model = network()
    optimizer = SWA(sgd(model), EACH, dtype="float64")
    train(model, optimizer, 5)
    live, average = values(model.parameters()), optimizer.averaged_parameters
    narrowed = [a.float() for a in average]
    with optimizer.averaged():
        assert same(model.parameters(), narrowed)
        assert same(optimizer.averaged_parameters, average)
        with torch.no_grad():
            model[0].weight.fill_(3.0)  # to a copy, not to the average
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, average)
    optimizer.finalize()
    assert same(model.parameters(), narrowed)
    assert same(optimizer.averaged_parameters, average)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_float64_run_is_resumed_bit_for_bit():
    model = network()
    optimizer = SWA(sgd(model), EACH, dtype="float64")
    train(model, optimizer, 4)
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = SWA(sgd(resumed), EACH, dtype="float64")
    other.load_state_dict(saved(optimizer))
    for pair in ((model, optimizer), (resumed, other)):
        train(*pair, 3, seed=8)
    assert same(optimizer.averaged_parameters, other.averaged_parameters)
    assert all(average.dtype == torch.float64 for average in other.averaged_parameters)


def test_a_saved_average_is_widened_but_not_narrowed():
    (model, narrow), wide_model = averaging(EACH), network()
    train(model, narrow, 3)
    wide = SWA(sgd(wide_model), EACH, dtype="float64")
    wide.load_state_dict(saved(narrow))
    widened = [average.double() for average in narrow.averaged_parameters]
    assert same(wide.averaged_parameters, widened)
    train(wide_model, wide, 1)
    before = narrow.averaged_parameters
    with pytest.raises(StructureError, match=r"kept in float32, but the saved one is float64"):
        narrow.load_state_dict(saved(wide))
    assert same(narrow.averaged_parameters, before)


@pytest.mark.parametrize("dtype", [torch.float32, "float32", None])
def test_float32_is_the_least_of_all(dtype):
    weights = parameters()
    optimizer = SWA(Scribble(weights), EACH, dtype=dtype)
    optimizer.step()
    got = [average.dtype for average in optimizer.averaged_parameters]
    assert got == [torch.promote_types(w.dtype, torch.float32) for w in weights]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "half", "float128", torch.int64, 64])
def test_dtypes_that_are_none_for_averages_are_refused(dtype):
    with pytest.raises(ValueError, match="averages are kept in float32 or float64"):
        SWA(sgd(network()), EACH, dtype=dtype)


# device=


@pytest.mark.parametrize("device", ["cuda", torch.device("meta"), "cuda:1"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=r"beside the weights .* or on the host"):
        SWA(sgd(network()), EACH, device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_weights_on_the_host_need_no_copies(device):
    (model, optimizer), (plain_model, plain) = averaging(EACH, device=device), averaging(EACH)
    train(model, optimizer, 4)
    train(plain_model, plain, 4)
    assert same(optimizer.averaged_parameters, plain.averaged_parameters)
    host = optimizer._average.host
    assert host._thread is None
    assert not host._copies


class Aside(TorchDriver):
    """The driver of the torch adapter, with averages on the host."""

    def start(self, *args, **kwargs):
        super().start(*args, **kwargs)
        lengths = {k: kwargs.get(k) for k in ("steps_per_epoch", "total_steps")}
        self.optimizer = aside(SWA(self.inner, self.optimizer.config, device="cpu", **lengths))


# But for the longest one, of tens of thousands of snapshots, whose arithmetic is the same.
CHECKS = {name: run for name, run, _ in checks_of(Aside) if name != "average_stays_precise"}


@pytest.mark.parametrize("name", CHECKS)
def test_conformance_of_averages_on_the_host(name):
    CHECKS[name]()


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_copies_put_aside_give_the_same_average(nonfinite, dtype):
    config = SWAConfig(start="1step", every="1step", nonfinite=nonfinite)
    averages = []
    for device in (None, "cpu"):
        weights = parameters()
        optimizer = SWA(Scribble(weights), config, device=device, dtype=dtype)
        if device:
            aside(optimizer)
        torch.manual_seed(3)
        for update in range(6):
            optimizer.step()
            if update == 3:
                with optimizer.averaged():
                    averages.append(values(weights))
        averages.append(optimizer.averaged_parameters)
        averages.append(values(weights))
    assert all(same(*pair) for pair in zip(averages[:3], averages[3:], strict=True))


def test_there_is_one_copy_of_the_weights():
    weights = parameters()
    optimizer = aside(SWA(Scribble(weights), EACH, device="cpu"))
    for _ in range(3):
        optimizer.step()
        with optimizer.averaged():
            optimizer.state_dict()
    (room,) = optimizer._average.host._copies.values()
    rows = {copied.untyped_storage().data_ptr(): copied.untyped_storage() for copied in room}
    whole = sum(row.nbytes() for row in rows.values())
    assert whole == sum(weight.numel() * weight.element_size() for weight in weights)
    assert all(
        r.stride() == torch.empty_like(w).stride() for r, w in zip(room, weights, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_snapshots_nor_swaps_take_memory_besides(dtype):
    weights = [torch.nn.Parameter(torch.ones(1024, 1024, dtype=dtype)) for _ in range(2)]
    optimizer = aside(SWA(torch.optim.SGD(weights, lr=1.0), EACH, device="cpu"))

    def swap():
        with optimizer.averaged():
            pass

    for _ in range(2):
        optimizer.step()
        swap()
    size = 2 * 1024 * 1024 * weights[0].element_size()
    assert peak(optimizer.step) < 0.01 * size
    assert peak(swap) < 0.01 * size


@pytest.fixture
def halted():
    """An optimizer on [1, 2, ...] whose thread waits for an event before it averages 3."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = aside(SWA(torch.optim.SGD([weight], lr=1.0), EACH, device="cpu"))

    def step():
        weight.grad = -torch.ones(2)
        optimizer.step()

    step()
    step()
    assert optimizer.n_averaged == 2
    event = threading.Event()
    optimizer._average.host._do(event.wait)
    step()
    yield weight, optimizer, event
    event.set()


def test_training_goes_on_while_the_host_averages(halted):
    weight, optimizer, event = halted
    assert optimizer.updates == 3
    with torch.no_grad():
        weight.fill_(50.0)
    assert optimizer._average.host.is_busy()
    event.set()
    assert optimizer.averaged_parameters[0].tolist() == [2.0, 2.0]
    assert optimizer.n_averaged == 3
    assert not optimizer._average.host.is_busy()


def swapped(optimizer):
    with optimizer.averaged():
        return optimizer.param_groups[0]["params"][0][0].item()


def finalized(optimizer):
    optimizer.finalize()
    return optimizer.param_groups[0]["params"][0][0].item()


READS = {
    "n_averaged": lambda o: o.n_averaged - 1,
    "n_skipped": lambda o: o.n_skipped + 2,
    "averaged_parameters": lambda o: o.averaged_parameters[0][0].item(),
    "averaged": swapped,
    "finalize": finalized,
    "state_dict": lambda o: o.state_dict()["swa"]["averages"][0]["swa_average"][0].item(),
    "counters": lambda o: o.state_dict()["swa"]["n_averaged"] - 1,
    "cohorts": lambda o: o.state_dict()["swa"]["cohorts"][0]["n_averaged"] - 1,
    "deepcopy": lambda o: copy.deepcopy(o).averaged_parameters[0][0].item(),
    "pickle": lambda o: pickle.loads(pickle.dumps(o)).averaged_parameters[0][0].item(),
}


@pytest.mark.parametrize("name", READS)
def test_whatever_reads_the_average_waits_for_it(halted, name):
    _, optimizer, event = halted
    threading.Timer(0.05, event.set).start()
    assert READS[name](optimizer) == 2.0


def test_the_next_snapshot_waits(halted):
    weight, optimizer, event = halted
    threading.Timer(0.05, event.set).start()
    weight.grad = -torch.ones(2)
    optimizer.step()
    assert event.is_set()
    assert optimizer.averaged_parameters[0].tolist() == [2.5, 2.5]


def test_loading_waits_and_takes_what_was_saved(halted):
    _, optimizer, event = halted
    weight = torch.nn.Parameter(torch.zeros(2))
    other = SWA(torch.optim.SGD([weight], lr=1.0), EACH)
    weight.grad = -torch.ones(2)
    other.step()
    state = other.state_dict()
    threading.Timer(0.05, event.set).start()
    optimizer.load_state_dict(state)
    assert event.is_set()
    assert (optimizer.updates, optimizer.n_averaged) == (1, 1)
    assert optimizer.averaged_parameters[0].tolist() == [1.0, 1.0]


def test_a_snapshot_with_nan_is_left_out_by_the_host():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = aside(SWA(torch.optim.SGD([weight], lr=1.0), EACH, device="cpu"))
    for value in (1.0, float("nan"), 3.0, float("inf")):
        weight.data.fill_(value)
        optimizer.step()
    assert (optimizer.n_averaged, optimizer.n_skipped) == (2, 2)
    assert optimizer.averaged_parameters[0].tolist() == [2.0, 2.0]


def test_an_error_on_the_host_is_raised_and_the_average_not_relied_on(monkeypatch):
    model, optimizer = averaging(EACH, device="cpu")
    aside(optimizer)
    train(model, optimizer, 2)
    state, weights = saved(optimizer), values(model.parameters())
    average = optimizer.averaged_parameters

    def broken(*args):
        raise MemoryError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(Cohort, "add_snapshot", broken)
        train(model, optimizer, 1)
        with pytest.raises(SWAError) as raised:
            train(model, optimizer, 1)
    assert "cannot add snapshot 3 at update 3: averaging on the host failed" in str(raised.value)
    assert "MemoryError: no memory left" in str(raised.value)
    assert "Hint: load an earlier checkpoint" in str(raised.value)
    for read in (lambda: optimizer.averaged_parameters, optimizer.state_dict, optimizer.finalize):
        with pytest.raises(SWAError, match="cannot be relied on"):
            read()
    with torch.no_grad():
        for weight, value in zip(model.parameters(), weights, strict=True):
            weight.copy_(value)
    optimizer.load_state_dict(state)
    assert same(optimizer.averaged_parameters, average)
    train(model, optimizer, 1)
    assert optimizer.n_averaged == 3


def test_the_live_weights_return_from_the_copies():
    model, optimizer = averaging(EACH, device="cpu")
    aside(optimizer)
    with pytest.raises(NothingAveragedError):
        optimizer.finalize()
    train(model, optimizer, 4)
    live, average = values(model.parameters()), optimizer.averaged_parameters
    states = []

    def use():
        with optimizer.averaged(model, [x for x, _ in batches(2)]):
            assert same(model.parameters(), average)
            states.append(copy.deepcopy(optimizer.state_dict()))
            with pytest.raises(SwappedError):
                optimizer.step()
            with torch.no_grad():
                model[0].weight.fill_(9.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, average)
    optimizer.load_state_dict(states[0])
    assert same(model.parameters(), live)
    optimizer.finalize()
    assert same(model.parameters(), average)
    train(model, optimizer, 1)
    assert optimizer.n_averaged == 5
