"""Averages of many small parameters stand in one row of memory; nobody else notices."""

from __future__ import annotations

import copy
import io
import pickle
import resource

import pytest
import torch
from adapter_torch.training import same, values

from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_torch import SWA, cohort, layout, packed, scratch

EACH = SWAConfig(start="1step", every="1step")


def parameters(seed=0):
    """Parameters of every kind, of which some can be packed with others."""
    torch.manual_seed(seed)
    return [
        *(torch.nn.Parameter(torch.randn(n)) for n in (7, 1, 300, 16, 16, 64, 3)),
        *(torch.nn.Parameter(torch.randn(n, 5)) for n in (2, 9, 4)),
        *(torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (7, 30, 8)),
        *(torch.nn.Parameter(torch.randn(n).half()) for n in (5, 5)),
        *(torch.nn.Parameter(torch.randn(n).double()) for n in (4, 6)),
        *(torch.nn.Parameter(torch.randn(n, 2, dtype=torch.complex64)) for n in (3, 4)),
        *(
            torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
            for _ in range(2)
        ),
        *(torch.nn.Parameter(torch.randn(5, n).t()) for n in (6, 8)),
        torch.nn.Parameter(torch.randn(40)[::2]),
        torch.nn.Parameter(torch.randn(())),
        torch.nn.Parameter(torch.randn(0, 5)),
        torch.nn.Parameter(torch.randn(0)),
        torch.nn.Parameter(torch.randn(1).expand(6)),
        torch.nn.Parameter(torch.randn(70, 60)),
        torch.nn.Parameter(torch.randn(60, 70).bfloat16()),
    ]


class Scribble(torch.optim.Optimizer):
    """Writes random numbers into the weights."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = torch.empty_like(p).copy_(torch.randn(p.shape))  # elsewhere each time


def lerp_of_each(averages, weights, share):
    for average, weight in zip(averages, weights, strict=True):
        wide = weight.detach().to(average.dtype)
        average.copy_(wide) if share == 1 else average.lerp_(wide, share)


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.8), Polynomial(eta=3)])
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
@pytest.mark.parametrize("room", [50, 1 << 20], ids=["cut", "whole"])
def test_the_average_is_lerp_of_each_parameter_bit_for_bit(monkeypatch, rule, nonfinite, room):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", room)
    monkeypatch.setattr(packed, "SMALL_ELEMENTS", min(room, packed.SMALL_ELEMENTS))
    weights = parameters()
    config = SWAConfig(start="1step", every="1step", rule=rule, nonfinite=nonfinite)
    optimizer = SWA(Scribble(weights), config)
    optimizer.step()
    expected = values(optimizer.averaged_parameters)
    held = optimizer._average.cohorts[0]
    assert sum(len(piece.members) for piece in held._pieces) >= 19
    total = 1.0
    for n in range(1, 6):
        optimizer.step()
        total = rule.retain(float(n)) * total + 1.0
        lerp_of_each(expected, weights, 1.0 / total)
    assert same(optimizer.averaged_parameters, expected)
    live = values(weights)
    with optimizer.averaged():
        assert same(weights, [a.to(p.dtype) for a, p in zip(expected, weights, strict=True)])
    assert same(weights, live)
    assert same(optimizer.averaged_parameters, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((100, 100),)], ids=["packed", "alone"])
def test_the_first_snapshot_keeps_every_bit(dtype, shapes):
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    odd = torch.tensor([-0.0, float("nan"), -float("inf")], dtype=dtype)
    if dtype == torch.float32:
        odd[1:2].view(torch.int32).fill_(0x7FC12345)  # a NaN with something in it
    for weight in weights:
        weight.data.view(-1)[:3] = odd
    config = SWAConfig(start="1step", every="1step", nonfinite="keep")
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), config)
    optimizer.step()
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    for average, weight in zip(optimizer.averaged_parameters, weights, strict=True):
        wide = weight.detach().to(average.dtype)
        assert torch.equal(average.view(bits), wide.view(bits))


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_snapshot_left_out_leaves_nothing_behind(monkeypatch, place):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", 20)
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(9)]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    expected = optimizer.averaged_parameters
    with torch.no_grad():
        weights[place][2] = float("nan")
    optimizer.step()
    assert (optimizer.n_averaged, optimizer.n_skipped) == (1, 1)
    assert same(optimizer.averaged_parameters, expected)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(5))
    optimizer.step()
    lerp_of_each(expected, weights, 0.5)
    assert same(optimizer.averaged_parameters, expected)


def test_cohorts_share_the_scratch_without_mixing_up():
    first = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    second = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
    optimizer = SWA(Scribble(first), EACH)
    optimizer.step()
    optimizer.add_param_group({"params": second})
    optimizer.step()
    expected = values(optimizer.averaged_parameters)
    optimizer.step()
    lerp_of_each(expected[:3], first, 1 / 3)
    lerp_of_each(expected[3:], second, 1 / 2)
    assert same(optimizer.averaged_parameters, expected)


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_what_is_gathered_once_is_used_once(nonfinite):
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    config = SWAConfig(start="1step", every="1step", nonfinite=nonfinite)
    optimizer = SWA(Scribble(weights), config)
    optimizer.step()
    expected = values(optimizer.averaged_parameters)
    for n in range(2, 5):
        optimizer.step()
        lerp_of_each(expected, weights, 1 / n)
    assert same(optimizer.averaged_parameters, expected)


@pytest.mark.parametrize("size", [20, 60], ids=["prepared", "cut"])
def test_what_is_gathered_is_not_used_where_it_was_overwritten(monkeypatch, size):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", 50)
    first = [torch.nn.Parameter(torch.randn(size, 1).bfloat16())]
    second = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
    optimizer = SWA(Scribble(first), EACH)
    optimizer.step()
    optimizer.add_param_group({"params": second})
    optimizer.step()
    for n in range(3, 6):
        expected = values(optimizer.averaged_parameters)
        optimizer.step()
        lerp_of_each(expected[:1], first, 1 / n)
        lerp_of_each(expected[1:], second, 1 / (n - 1))
        assert same(optimizer.averaged_parameters, expected)


def test_one_bad_element_of_whatever_parameter_is_found(monkeypatch):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", 50)
    monkeypatch.setattr(packed, "SMALL_ELEMENTS", 50)
    weights = parameters()
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    expected = optimizer.averaged_parameters
    spoilt = 0
    for weight in weights:
        if weight.numel():
            before = weight.detach().clone()
            bad = torch.zeros(()).to(weight.dtype).fill_(float("inf"))
            weight.data[(..., -1) if weight.dim() else ...] = bad
            optimizer.step()
            weight.data.copy_(before) if weight.stride() != (0,) else weight.data[0].copy_(
                before[0]
            )
            spoilt += 1
            assert optimizer.n_skipped == spoilt, (spoilt, weight)
    assert spoilt == len(weights) - 2
    optimizer.step()
    assert optimizer.n_averaged == 2
    assert all(map(torch.allclose, optimizer.averaged_parameters, expected))


def test_saved_and_copied_states_hold_each_average_once():
    weights = [torch.nn.Parameter(torch.randn(100)) for _ in range(300)]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    optimizer.step()
    size = 300 * 100 * 4
    averages = [
        entry["swa_average"] for entry in optimizer.state_dict()["swa"]["averages"].values()
    ]
    assert len(averages) == 300
    assert all(average.untyped_storage().nbytes() == 400 for average in averages)
    overhead = 300 * 1000
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    assert size < len(saved.getvalue()) < size + overhead
    assert len(pickle.dumps(optimizer.state_dict())) < size + overhead
    assert len(pickle.dumps(optimizer)) < 2 * (size + overhead)  # the weights as well
    with optimizer.averaged():
        inside = io.BytesIO()
        torch.save(optimizer.state_dict(), inside)
        assert len(inside.getvalue()) < 2 * (size + overhead)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_average_on_their_own(copied):
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(6)]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    before = optimizer.averaged_parameters
    other = copied(optimizer)
    theirs = other.param_groups[0]["params"]
    with torch.no_grad():
        for weight in theirs:
            weight.fill_(3.0)
    other.step()
    assert same(optimizer.averaged_parameters, before)
    lerp_of_each(before, theirs, 0.5)
    assert same(other.averaged_parameters, before)
    optimizer.step()
    assert same(optimizer.averaged_parameters, weights)


def test_what_state_dict_gives_changes_no_more():
    weights = [torch.nn.Parameter(torch.zeros(5)) for _ in range(6)]
    optimizer = SWA(Scribble(weights), EACH)
    optimizer.step()
    averages = optimizer.state_dict()["swa"]["averages"]
    before = values(entry["swa_average"] for entry in averages.values())
    optimizer.step()
    assert same([entry["swa_average"] for entry in averages.values()], before)


# Noticing changes.

CHANGES = {
    "shape": lambda: torch.zeros(3, 2),
    "dtype": lambda: torch.zeros(2, 3, dtype=torch.float64),
    "device": lambda: torch.zeros(2, 3, device="meta"),
    "dimensions": lambda: torch.zeros(2, 3, 1),
}


@pytest.mark.parametrize("glances", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layout_is_noticed(monkeypatch, name, glances):
    if not glances:
        monkeypatch.setattr(layout, "_glance", lambda tensors: None)
    tensors = [torch.zeros(4), torch.zeros(2, 3)]
    seen = layout.Layout(tensors)
    assert seen.holds(tensors)
    assert seen.holds([torch.ones(4), torch.ones(2, 3)])
    assert not seen.holds([tensors[0], CHANGES[name]()])
    # What is none of its business.
    assert seen.holds([tensors[0], torch.zeros(3, 2).t()])
    assert seen.holds([tensors[0], torch.nn.Parameter(tensors[1])])
    with torch.inference_mode():
        assert seen.holds(tensors)
    assert seen.holds(tensors)
    assert not seen.holds([tensors[0], CHANGES[name]()])


def test_glancing_works_in_this_version():
    # Else every snapshot compares attributes: right, and several times slower.
    tensors = [torch.zeros(4), torch.zeros(2, 3)]
    glance = layout._glance(tensors)
    assert glance is not None
    assert glance(*tensors)


def test_weights_that_moved_are_followed():
    weights = [torch.nn.Parameter(torch.zeros(5)) for _ in range(6)]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    for weight in weights:
        weight.data = torch.full((5,), 2.0)
    optimizer.step()
    assert all((average == 1.0).all() for average in optimizer.averaged_parameters)


# Memory, measured without a clock.

SETS = {
    "small": [(1000,)] * 2000,
    "mixed": [(1000,)] * 200 + [(2048, 1024)] * 3,
    "large": [(2048, 2048)] * 2,
}


def idle(shapes, dtype, **kwargs):
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    return weights, SWA(torch.optim.SGD(weights, lr=1.0), **kwargs)


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["small", "mixed"])
def test_a_snapshot_faults_in_no_fresh_pages(name, dtype, nonfinite):
    config = SWAConfig(start="1step", every="1step", nonfinite=nonfinite)
    _, optimizer = idle(SETS[name], dtype, config=config)
    for _ in range(3):
        optimizer.step()  # without gradients: only the snapshot works
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        optimizer.step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert optimizer.n_averaged == 8
    assert faults < 200, faults


def peak(work):
    """The most bytes that were live at once in tensors made by ``work``."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        work()
    live = most = 0
    for event in profiled.profiler.kineto_results.events():
        live += event.nbytes()
        most = max(most, live)
    return most


def test_the_measure_of_memory_works():
    assert 4_000_000 <= peak(lambda: torch.zeros(1_000_000)) < 4_100_000
    assert 12_000_000 <= peak(lambda: [torch.zeros(1_000_000) for _ in range(3)]) < 12_100_000
    # A temporary inside of an operation counts too.
    assert peak(lambda: torch.zeros(1000, 1000).t().reshape(-1)) >= 8_000_000


@pytest.mark.parametrize("name", ["mixed", "large"])
@pytest.mark.parametrize(
    ("dtype", "copies"), [(torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 1)]
)
def test_snapshots_and_swaps_take_no_memory_of_the_size_of_the_average(name, dtype, copies):
    weights, optimizer = idle(SETS[name], dtype, config=EACH)
    optimizer.step()

    def swap():
        with optimizer.averaged():
            pass

    optimizer.step()
    swap()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    assert peak(optimizer.step) < 0.01 * size
    assert copies * size <= peak(swap) < (copies + 0.01) * size
    assert peak(optimizer.finalize) < (copies + 0.01) * size


def test_the_averages_are_all_that_is_allocated_at_the_start():
    weights, optimizer = idle(SETS["small"], torch.float32, config=EACH)
    size = 4 * sum(weight.numel() for weight in weights)
    assert size <= peak(optimizer.step) < 1.05 * size + 4 * scratch.SCRATCH_ELEMENTS


def test_small_is_small():
    packable = [torch.zeros(packed.SMALL_ELEMENTS) for _ in range(2)]
    whole = [torch.zeros(packed.SMALL_ELEMENTS + 1) for _ in range(2)]
    where = [cohort.Position(0, i) for i in range(4)]
    held = cohort.Cohort(where, [*packable, *whole])
    assert [piece.members for piece in held._pieces] == [[0, 1]]
