"""What is averaged, how, and what is refused."""

import resource

import numpy as np
import pytest
import torch
from adapter_torch.training import averaging, network, same, sgd, train, values

from swa_core import EMA, Polynomial, StructureError, SWAConfig, Uniform
from swa_torch import SWA

EACH = SWAConfig(start="1step", every="1step")


def descend(optimizer, updates=1):
    """Updates with the gradient 1 everywhere, so that weights fall by lr at each."""
    for _ in range(updates):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()


def parameter(*shape, dtype=torch.float32, **kwargs):
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), **kwargs)


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.8), Polynomial(eta=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_is_that_of_the_weights_the_training_visited(rule, dtype):
    config = SWAConfig(start="3step", every="2step", rule=rule)
    model = network().to(dtype)
    optimizer = SWA(sgd(model), config)
    visited = []
    for x in torch.randn(9, 8, 4, dtype=dtype):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        visited.append([p.detach().double().numpy().copy() for p in model.parameters()])
    expected = [np.zeros_like(leaf) for leaf in visited[0]]
    for n, update in enumerate((3, 5, 7, 9), 1):
        share = rule.mixing_weight(float(n))
        expected = [e + share * (w - e) for e, w in zip(expected, visited[update - 1], strict=True)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for average, value in zip(optimizer.averaged_parameters, expected, strict=True):
        assert average.dtype == dtype
        np.testing.assert_allclose(average.numpy(), value, rtol=tolerance, atol=tolerance)


def test_first_snapshot_is_a_copy_with_memory_of_its_own():
    model, optimizer = averaging()
    train(model, optimizer, 4)
    assert same(optimizer.averaged_parameters, model.parameters())
    read = optimizer.averaged_parameters
    kept = values(read)
    for tensor in optimizer.averaged_parameters:
        tensor.fill_(5.0)
    train(model, optimizer, 1)
    assert same(optimizer.averaged_parameters, kept)
    train(model, optimizer, 1)
    assert same(read, kept)
    assert not same(optimizer.averaged_parameters, kept)


def test_averages_neither_require_nor_hold_gradients():
    model, optimizer = averaging(EACH)
    train(model, optimizer, 3)
    assert not any(a.requires_grad for a in optimizer.averaged_parameters)
    assert not any(a.requires_grad for c in optimizer._average.cohorts for a in c.averages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_averages_in_float32(dtype):
    # Three tensors: one larger than the scratch, one with rows larger than it, one small.
    shapes = ((3, 700_000), (1, 1, 2_100_000), (5,))
    weights = [parameter(*shape, dtype=dtype) for shape in shapes]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    descend(optimizer, 4)  # -1, -2, -3, -4
    for p in weights:
        p.data[..., 0] = 128.0
    descend(optimizer)  # 127 there, else -5
    for average, weight in zip(optimizer.averaged_parameters, weights, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average[..., 0], torch.full_like(average[..., 0], 23.4))
        assert (average[..., 1:] == -3.0).all()
        assert weight.dtype == dtype


def test_complex_empty_scalar_and_strided_parameters():
    strided = torch.nn.Parameter(torch.zeros(4, 6).t())
    channels_last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kinds = [
        parameter(3, dtype=torch.complex64),
        parameter(0, 3),
        parameter(),
        strided,
        torch.nn.Parameter(channels_last),
    ]
    optimizer = SWA(torch.optim.SGD(kinds, lr=1.0), EACH)
    descend(optimizer, 3)
    for average, p in zip(optimizer.averaged_parameters, kinds, strict=True):
        assert torch.equal(average, torch.full_like(p, -2.0))
        assert average.dtype == p.dtype
    with optimizer.averaged():
        assert all(torch.equal(p, torch.full_like(p, -2.0)) for p in kinds)
    assert all(torch.equal(p, torch.full_like(p, -3.0)) for p in kinds)
    with torch.no_grad():
        kinds[0][1] = complex(0, float("nan"))
    descend(optimizer)
    assert optimizer.n_skipped == 1


def test_tied_parameters_join_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = SWA(torch.optim.SGD(model.parameters(), lr=1.0), EACH)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    descend(optimizer, 2)
    before = values(model.parameters())
    with optimizer.averaged():
        assert model[1].weight is model[0].weight
        assert same(model.parameters(), optimizer.averaged_parameters)
    assert same(model.parameters(), before)


def test_a_parameter_named_twice_in_a_group_joins_once():
    weight = parameter(2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = torch.optim.SGD([weight, weight], lr=0.5)
    optimizer = SWA(inner, SWAConfig(start="1step", every="1step", rule=EMA(0.5)))
    descend(optimizer, 2)  # each update twice: -1, -2
    with optimizer.averaged():
        assert torch.allclose(weight, torch.tensor(-5 / 3))
    assert same(optimizer.averaged_parameters, [optimizer.averaged_parameters[0]] * 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.tolist() == [-2.0, -2.0]


def test_frozen_parameters_are_left_alone_and_join_when_they_train():
    trained, frozen = parameter(2), parameter(2, requires_grad=False)
    optimizer = SWA(torch.optim.SGD([trained, frozen], lr=1.0), EACH)
    descend(optimizer, 2)
    frozen.fill_(7.0)
    assert optimizer.averaged_parameters[1].tolist() == [7.0, 7.0]
    with optimizer.averaged():
        assert trained.tolist() == [-1.5, -1.5]
        assert frozen.tolist() == [7.0, 7.0]
        frozen.fill_(8.0)
    assert frozen.tolist() == [8.0, 8.0]
    frozen.requires_grad_(True)
    descend(optimizer, 2)  # 7, 6
    assert [a[0].item() for a in optimizer.averaged_parameters] == [-2.5, 6.5]
    frozen.requires_grad_(False)  # once in the average, it stays
    descend(optimizer, 1)
    assert optimizer.averaged_parameters[1][0].item() == pytest.approx(19 / 3)


def test_everything_frozen():
    weight = parameter(2, requires_grad=False)
    optimizer = SWA(torch.optim.SGD([weight], lr=1.0), EACH)
    optimizer.step()
    assert optimizer.n_averaged == 1
    with optimizer.averaged():
        pass
    optimizer.finalize()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("rule", [Uniform(), EMA(0.5)])
def test_a_group_added_later_joins_with_its_own_count(rule):
    first, second = parameter(2), parameter(3)
    config = SWAConfig(start="1step", every="1step", rule=rule)
    optimizer = SWA(torch.optim.SGD([first], lr=1.0), config)
    descend(optimizer, 3)
    optimizer.add_param_group({"params": [second]})
    descend(optimizer, 2)  # -1, -2
    share = rule.mixing_weight(2.0)
    averages = optimizer.averaged_parameters
    assert averages[1].tolist() == pytest.approx([-1 - share] * 3)
    assert optimizer.n_averaged == 5
    with optimizer.averaged():
        assert same([first, second], averages)
    assert second.tolist() == [-2.0] * 3


def test_nonfinite_snapshots_are_left_out_and_counted():
    weight, other = parameter(3), parameter(2)
    optimizer = SWA(torch.optim.SGD([weight, other], lr=1.0), EACH)
    descend(optimizer, 1)
    with torch.no_grad():
        other[1] = float("-inf")
    descend(optimizer, 2)
    assert (optimizer.n_averaged, optimizer.n_skipped) == (1, 2)
    assert optimizer.averaged_parameters[0].tolist() == [-1.0] * 3
    with torch.no_grad():
        other[1] = 0.0
    descend(optimizer, 1)
    assert (optimizer.n_averaged, optimizer.n_skipped) == (2, 2)
    assert optimizer.averaged_parameters[0].tolist() == [-2.5] * 3


def change_shape(optimizer):
    optimizer.param_groups[1]["params"][0].data = torch.zeros(5)


def change_dtype(optimizer):
    weight = optimizer.param_groups[1]["params"][0]
    weight.data = weight.data.double()


def change_number(optimizer):
    optimizer.param_groups[1]["params"].append(parameter(1))


def drop_group(optimizer):
    del optimizer.param_groups[1]


def tie(optimizer):
    optimizer.param_groups[1]["params"][0] = optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, r"parameter 0 of group 1 \('head'\) has shape \(5,\), .* holds \(3,\)"),
        (change_dtype, r"parameter 0 of group 1 \('head'\) has dtype float64, .* float32"),
        (change_number, r"group 1 has 2 parameters, .* holds 1"),
        (drop_group, r"the optimizer has 1 parameter groups, .* holds 2"),
        (tie, r"parameter 0 of group 1 \('head'\) is now another one"),
    ],
)
def test_changed_parameters_are_refused_with_nothing_half_done(change, message):
    groups = [{"params": [("body", parameter(2))]}, {"params": [("head", parameter(3))]}]
    optimizer = SWA(torch.optim.SGD(groups, lr=1.0), SWAConfig(start="2step", every="2step"))
    descend(optimizer, 3)
    average = optimizer.averaged_parameters
    change(optimizer)
    with pytest.raises(
        StructureError, match=r"cannot add snapshot 2 at update 4: .*" + message
    ) as raised:
        descend(optimizer)
    assert "Hint: every snapshot needs the same weights" in str(raised.value)
    assert (optimizer.updates, optimizer.n_averaged) == (4, 1)
    assert same(optimizer.averaged_parameters, average)
    live = values(optimizer.param_groups[0]["params"])
    for use in (optimizer.averaged().__enter__, optimizer.finalize, optimizer.state_dict):
        with pytest.raises(StructureError):
            use()
    assert same(optimizer.param_groups[0]["params"], live)
    descend(optimizer)  # no snapshot, so nobody looks


def test_parameters_that_were_replaced_by_equal_ones_are_followed():
    # As sharding does: another Parameter object in the same place.
    optimizer = SWA(torch.optim.SGD([parameter(2)], lr=1.0), EACH)
    descend(optimizer, 2)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.full((2,), -2.0))
    descend(optimizer)
    assert optimizer.averaged_parameters[0].tolist() == [-2.0, -2.0]


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="no resource usage here")
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_snapshot_allocates_nothing_of_the_size_of_the_weights(dtype, nonfinite):
    # 4 tensors of 8 MB or more: a temporary would fault in thousands of fresh pages.
    weights = [parameter(2048, 2048, dtype=dtype) for _ in range(4)]
    config = SWAConfig(start="1step", every="1step", nonfinite=nonfinite)
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), config)
    for _ in range(3):
        optimizer.step()  # without gradients: only the snapshot works
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        optimizer.step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert optimizer.n_averaged == 8
    assert faults < 200, faults


def test_swapping_float32_allocates_nothing_of_the_size_of_the_weights():
    weights = [parameter(2048, 2048) for _ in range(4)]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), EACH)
    optimizer.step()
    with optimizer.averaged():
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        with optimizer.averaged():
            pass
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 200, faults


def test_an_update_that_is_no_snapshot_looks_at_no_parameter(monkeypatch):
    model, optimizer = averaging(SWAConfig(start="100step", every="1step"))
    train(model, optimizer, 1)
    calls = []
    monkeypatch.setattr(type(optimizer._average), "join", lambda *args: calls.append(args))
    train(model, optimizer, 98)
    assert not calls
    train(model, optimizer, 1)
    assert len(calls) == 1
