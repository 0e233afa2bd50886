"""The average in a file: it outlives the process, and others read it."""

import os

import numpy as np
import pytest
import torch
from adapter_torch.test_state import stretch
from adapter_torch.training import (
    EVERY_OTHER,
    averaging,
    network,
    on_disk,
    same,
    sgd,
    train,
    values,
)
from safetensors.torch import load_file

from swa_core import (
    EMA,
    LearningRate,
    StateError,
    StructureError,
    SWAConfig,
    SwappedError,
    SWAState,
    load_average,
    save_average,
)
from swa_torch import SWA


@pytest.mark.parametrize("at", [1, 4, 5, 9])
def test_a_training_goes_on_from_the_file_bit_for_bit(tmp_path, at):
    rate = LearningRate(value=0.02, anneal="6step")
    config = SWAConfig(start="4step", every="2step", rule=EMA(0.6), lr=rate)
    model, optimizer = averaging(config)
    stretch(model, optimizer, 0, at)
    optimizer.save_average(tmp_path / "average", model)
    plain, weights = on_disk((optimizer.optimizer.state_dict(), model.state_dict()))
    other, resumed = averaging(config)
    other.load_state_dict(weights)
    resumed.optimizer.load_state_dict(plain)
    resumed.load_average(tmp_path / "average", other)
    stretch(model, optimizer, at, 14)
    stretch(other, resumed, at, 14)
    assert same(model.state_dict().values(), other.state_dict().values())
    assert same(optimizer.averaged_parameters, resumed.averaged_parameters)
    assert (resumed.updates, resumed.n_averaged) == (14, 6)
    assert resumed._average.total == optimizer._average.total


def test_torchs_readers_find_the_averages_under_the_names_of_the_parameters(tmp_path):
    model, optimizer = averaging()
    train(model, optimizer, 7)
    before = values(model.state_dict().values())
    optimizer.save_average(tmp_path / "average.safetensors", torch.compile(model, backend="eager"))
    assert same(before, model.state_dict().values())
    found = load_file(tmp_path / "average.safetensors")
    names = [name for name, _ in model.named_parameters()]
    assert sorted(found) == sorted(names)
    assert same([found[name] for name in names], optimizer.averaged_parameters)
    with optimizer.averaged():
        optimizer.save_average(tmp_path / "inside", model)
    assert load_file(tmp_path / "inside").keys() == found.keys()
    assert same(load_file(tmp_path / "inside").values(), found.values())
    described = load_average(tmp_path / "average.safetensors")
    assert (described.config, described.framework) == (EVERY_OTHER, "torch")
    assert described.versions["torch"] == torch.__version__


def test_half_precision_stays_float32_and_tied_weights_stand_once(tmp_path):
    def tied():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model.bfloat16()

    def trained(model):
        optimizer = SWA(sgd(model), EVERY_OTHER)
        for update in range(7):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, update / 3)
            optimizer.step()
        return optimizer

    model = tied()
    optimizer = trained(model)
    optimizer.save_average(tmp_path / "average", model)
    found = load_file(tmp_path / "average")
    assert sorted(found) == ["0.weight", "1.bias"]
    assert found["0.weight"].dtype == torch.float32
    other = tied()
    resumed = SWA(sgd(other), EVERY_OTHER)
    resumed.load_average(tmp_path / "average", other)
    assert same(resumed.averaged_parameters, optimizer.averaged_parameters)


def test_parameters_that_joined_later_keep_their_count(tmp_path):
    def grown():
        model = network()
        optimizer = SWA(torch.optim.SGD(model[0].parameters(), lr=0.05), EVERY_OTHER)
        return model, optimizer

    model, optimizer = grown()
    train(model, optimizer, 5)
    optimizer.add_param_group({"params": [*model[1].parameters(), *model[3].parameters()]})
    train(model, optimizer, 4)
    optimizer.save_average(tmp_path / "average", model)
    assert load_average(tmp_path / "average").counts["3.bias"] == (2, 2.0)
    other, resumed = grown()
    resumed.add_param_group({"params": [*other[1].parameters(), *other[3].parameters()]})
    other.load_state_dict(model.state_dict())
    resumed.load_average(tmp_path / "average", other)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 6)
    assert same(optimizer.averaged_parameters, resumed.averaged_parameters)
    assert resumed.n_averaged == 6


def test_an_average_of_other_names_and_layouts(tmp_path):
    model, optimizer = averaging()
    arrays = {f"theirs/{n}": p.detach().numpy() + 1 for n, p in model.named_parameters()}
    arrays["theirs/0.weight"] = arrays["theirs/0.weight"].T
    state = SWAState(9, 3, 1, 3.0, arrays)
    save_average(tmp_path / "theirs", state, EVERY_OTHER, framework="keras")
    names = {name: f"theirs/{name}" for name, _ in model.named_parameters()}
    optimizer.load_average(
        tmp_path / "theirs", model, names=names, transform={"0.weight": np.transpose}
    )
    assert same(optimizer.averaged_parameters, [p + 1 for p in model.parameters()])
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (9, 3, 1)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    model, optimizer = averaging()
    train(model, optimizer, 7)
    file = tmp_path / "average"
    optimizer.save_average(file, model)
    train(model, optimizer, 1)
    before = optimizer.averaged_parameters

    def refused(kind, message, **arguments):
        with pytest.raises(kind, match=message):
            optimizer.load_average(arguments.pop("file", file), model, **arguments)
        assert same(optimizer.averaged_parameters, before)
        assert optimizer.updates == 8

    found = load_average(file)
    for change, kind, message in (
        ({"extra": np.ones(1, "f4")}, StructureError, "trains no parameter 'extra'"),
        ({"0.bias": None}, StructureError, "parameter 1 of group 0.*'0.bias', is missing"),
        ({"0.bias": np.zeros(7, "f4")}, StructureError, r"\(6,\), but the saved one has \(7,\)"),
        ({"0.bias": np.zeros(6, "f8")}, StructureError, "the saved one is float64"),
    ):
        average = {**found.state.average, **change}
        save_average(tmp_path / "other", found.state._replace(average=average), EVERY_OTHER)
        refused(kind, message, file=tmp_path / "other")
    other = SWAConfig(start="4step", every="2step", rule=EMA(0.6))
    save_average(tmp_path / "rule", found.state, other)
    refused(StateError, "was made with rule", file=tmp_path / "rule")
    refused(StructureError, "which the file does not hold", names={"0.weight": "x"})
    with optimizer.averaged(), pytest.raises(SwappedError):
        optimizer.load_average(file, model)
    with pytest.raises(StructureError, match="no parameter of this model"):
        optimizer.save_average(tmp_path / "none", network())
    with pytest.raises(StructureError, match="no parameter of this model"):
        optimizer.load_average(file, network())
    assert sorted(os.listdir(tmp_path)) == ["average", "other", "rule"]


def test_before_the_first_snapshot_there_are_counters_alone(tmp_path):
    model, optimizer = averaging()
    train(model, optimizer, 2)
    optimizer.save_average(tmp_path / "early", model)
    assert not load_average(tmp_path / "early").state.average
    other, resumed = averaging()
    resumed.load_average(tmp_path / "early", other)
    train(other, resumed, 2)
    assert (resumed.updates, resumed.n_averaged) == (4, 1)
