"""``averaged_state_dict`` of models in one process; see ``full_state_checks`` for others."""

from __future__ import annotations

import pytest
import torch
from adapter_torch.training import EVERY_OTHER, averaging, network, same, sgd, train, values
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from swa_core import StructureError, SWAWarning
from swa_torch import SWA


def test_it_holds_averages_and_the_live_buffers():
    model, optimizer = averaging()
    train(model, optimizer, 7)
    found = optimizer.averaged_state_dict(model)
    averages = [*optimizer.averaged_parameters]
    assert [*found] == [*model.state_dict()]
    assert same([found[name] for name, _ in model.named_parameters()], averages)
    assert same([found[name] for name, _ in model.named_buffers()], [*model.buffers()])
    twin = network(seed=1)
    twin.load_state_dict(found)
    with optimizer.averaged():
        x = torch.ones(3, 4)
        assert torch.equal(twin.eval()(x), model.eval()(x))


def test_it_shares_no_memory_and_changes_nothing():
    model, optimizer = averaging()
    train(model, optimizer, 7)
    live, averages = values(model.state_dict().values()), optimizer.averaged_parameters
    for tensor in optimizer.averaged_state_dict(model).values():
        tensor.fill_(7)
    assert same(model.state_dict().values(), live)
    assert same(optimizer.averaged_parameters, averages)


def test_inside_averaged_it_is_the_same_but_for_the_buffers_there():
    model, optimizer = averaging()
    train(model, optimizer, 7)
    outside = optimizer.averaged_state_dict(model)
    data = [torch.ones(8, 4), torch.randn(8, 4)]
    with optimizer.averaged(model, bn_data=data):
        inside = optimizer.averaged_state_dict(model)
    names = [name for name, _ in model.named_parameters()]
    assert same([outside[name] for name in names], [inside[name] for name in names])
    assert not torch.equal(outside["1.running_mean"], inside["1.running_mean"])


def test_before_the_first_snapshot_it_is_the_live_model_and_says_so_once():
    model, optimizer = averaging()
    train(model, optimizer, 2)
    with pytest.warns(SWAWarning, match="nothing is averaged yet") as told:
        found = optimizer.averaged_state_dict(model)
    assert told[0].filename == __file__
    assert same(found.values(), model.state_dict().values())
    assert same(optimizer.averaged_state_dict(model).values(), found.values())


def test_weights_keep_their_dtypes_and_frozen_ones_are_live():
    model = network().bfloat16()
    model[0].bias.requires_grad_(False)
    optimizer = SWA(sgd(model), EVERY_OTHER)
    for update in range(8):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, update)
        optimizer.step()
    found = optimizer.averaged_state_dict(model)
    assert torch.equal(found["0.bias"], model[0].bias)
    averages = optimizer.averaged_parameters
    assert averages[0].dtype == torch.float32
    assert same([found["0.weight"]], [averages[0].bfloat16()])


def test_tied_weights_stand_under_both_names():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = SWA(sgd(model), EVERY_OTHER)
    for update in range(7):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, update)
        optimizer.step()
    found = optimizer.averaged_state_dict(model)
    assert [*found] == ["0.weight", "1.weight", "1.bias"]
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()
    assert same([found["1.weight"]], optimizer.averaged_parameters[:1])


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def wrapped(model):
    model[0] = checkpoint_wrapper(model[0])
    model[3] = torch.compile(model[3], backend="eager")
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda model: model, wrapped], ids=["plain", "wrapped"])
def test_its_names_are_those_of_torch(wrap):
    layers = [*network(), torch.nn.Module(), WithExtraState(1, 1)]
    layers[4].module = torch.nn.Linear(1, 1)  # a name of the user's own, which stays
    layers[4].register_buffer("scratch", torch.zeros(1), persistent=False)
    plain = torch.nn.Sequential(*layers)
    names = [*plain.state_dict()]
    model = wrap(plain)
    optimizer = SWA(sgd(model), EVERY_OTHER)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    found = optimizer.averaged_state_dict(model)
    expected = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert {*found} == {*expected} == {*names}
    assert found["5._extra_state"] == {"seen": 3}


def test_another_model_is_refused():
    model, optimizer = averaging()
    train(model, optimizer, 5)
    with pytest.raises(StructureError, match="none of the averages is of a parameter"):
        optimizer.averaged_state_dict(network())


def test_a_part_of_the_model_may_be_asked_for():
    model, optimizer = averaging()
    train(model, optimizer, 7)
    found = optimizer.averaged_state_dict(model[3])
    assert same(found.values(), optimizer.averaged_parameters[-2:])
