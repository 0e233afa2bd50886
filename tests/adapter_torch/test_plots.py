"""The loss around a model's weights, and that the model comes back as it was."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from adapter_torch.training import averaging, batches, network, same, sgd, train, values

from swa_core import (
    GeometryError,
    NothingAveragedError,
    StructureError,
    SwappedError,
    SWAWarning,
    load_average,
)
from swa_torch import SWA, loss_line, loss_plane, loss_rays, update_bn
from swa_torch.given_weights import arrays_of

DATA = [*batches(3, seed=3)]


def loss(model):
    x, y = DATA[0]
    return torch.nn.functional.mse_loss(model(x), y)


def plain(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def squares(model):
    return sum(parameter.square().sum() for parameter in model.parameters())


def everything(model, optimizer=None):
    """All that a call may not change, as copies."""
    states = [values(model.state_dict().values()), [m.training for m in model.modules()]]
    states += [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    states += [[None if p.grad is None else p.grad.tolist() for p in model.parameters()]]
    return states


def unchanged(before, after):
    return same(before[0], after[0]) and before[1:] == after[1:]


CALLS = {
    "line": lambda model, a, b, c, measure, **more: loss_line(
        model, a, b, measure, positions=[0.5], **more
    ),
    "plane": lambda model, a, b, c, measure, **more: loss_plane(
        model, a, b, c, measure, points=2, **more
    ),
    "rays": lambda model, a, b, c, measure, **more: loss_rays(
        model, a, measure, radii=[0.5, 1], directions=2, **more
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture
def trained():
    """A network in training with its averaging optimizer, and two of its snapshots."""
    model, optimizer = averaging()
    train(model, optimizer, 5)
    first = copy.deepcopy(model.state_dict())
    train(model, optimizer, 3, seed=8)
    second = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, seed=9)
    return model, optimizer, first, second


# What is measured.


def test_a_quadratic_is_a_parabola_along_a_line():
    first, second = plain(1), plain(2)
    model = plain(0)
    line = loss_line(model, first, second, squares)
    a, b = (torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (first, second))
    t = line.positions
    expected = (1 - t) ** 2 * float(a @ a) + 2 * t * (1 - t) * float(a @ b) + t**2 * float(b @ b)
    assert line.values() == pytest.approx(expected, rel=1e-5)
    assert line.length == pytest.approx(float((a - b).norm()), rel=1e-5)


def test_the_places_are_those_of_weights_loaded_by_hand(trained):
    model, _, first, second = trained
    line = loss_line(model, first, second, loss, bn_data=DATA, positions=[0.25])
    for t, found in zip(line.positions, line.values(), strict=True):
        by_hand = network()
        by_hand.load_state_dict(
            {k: v if "num" in k else torch.lerp(v, second[k], t) for k, v in first.items()}
        )
        update_bn(by_hand, DATA)
        with torch.no_grad():
            assert found == pytest.approx(float(loss(by_hand.eval())), rel=1e-4)


def test_batch_norm_is_recomputed_at_each_place(trained):
    model, _, first, second = trained
    layer = model[1]
    seen = []

    def measure(model):
        before = layer.running_mean.clone()
        update_bn(model.train(), DATA)
        seen.append(torch.allclose(before, layer.running_mean, atol=1e-6))
        return float(layer.running_mean.sum())

    line = loss_line(model, first, second, measure, bn_data=DATA, positions=[0.5])
    assert seen == [True] * 3
    assert len(set(line.values())) == 3


def test_without_data_the_statistics_are_the_models_and_a_warning_says_so(trained, call):
    model, optimizer, first, second = trained
    mean = model[1].running_mean.tolist()

    def measure(model):
        assert model[1].running_mean.tolist() == mean
        # Nothing of this is there at the next place.
        model[1].running_mean.add_(1)
        return 0.0

    with pytest.warns(SWAWarning, match="other weights look worse") as said:
        call(model, first, second, optimizer, measure)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_the_plane_through_two_snapshots_and_the_average(trained):
    model, optimizer, first, second = trained
    plane = loss_plane(model, first, second, optimizer, loss, bn_data=DATA, points=3)
    assert list(plane.corners) == ["w1", "w2", "w_SWA"]
    with optimizer.averaged(model, bn_data=DATA), torch.no_grad():
        expected = float(loss(model.eval()))
    assert plane.at_corners["loss"][2] == pytest.approx(expected, rel=1e-6)


def test_rays_from_the_average(trained):
    model, optimizer, *_ = trained
    rays = loss_rays(
        model, optimizer, loss, bn_data=DATA, radii=[0.1, 3], directions=3, name="w_SWA"
    )
    assert rays.values().shape == (3, 3)
    assert len(set(rays.values()[:, 0])) == 1
    assert rays.norm == pytest.approx(
        float(torch.cat([p.flatten() for p in optimizer.averaged_parameters]).norm()), rel=1e-5
    )


def test_a_step_of_radius_1_is_1_long():
    model = plain()
    own = values(model.parameters())

    def moved(model):
        return sum((p - o).square().sum() for p, o in zip(model.parameters(), own, strict=True))

    rays = loss_rays(model, None, moved, radii=[1, 2])
    assert rays.values() == pytest.approx(np.tile([0, 1, 4], (10, 1)), rel=1e-3)


def test_rays_leave_frozen_parameters_alone():
    model = plain()
    model[0].requires_grad_(False)
    frozen = model[0].weight.tolist()

    def measure(model):
        assert model[0].weight.tolist() == frozen
        return squares(model)

    rays = loss_rays(model, None, measure, radii=[1], directions=2)
    assert (rays.values()[:, 1] != rays.values()[:, 0]).all()
    # But a model that somebody has frozen as a whole can be looked at.
    model.requires_grad_(False)
    loss_rays(model, None, squares, radii=[1], directions=1)


def test_filters_are_rows():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0] = 0

    def first_row(model):
        return model.weight[0].square().sum()

    rays = loss_rays(model, None, first_row, normalization="filter", radii=[1], move_vectors=False)
    assert (rays.values() == 0).all()


def test_the_model_evaluates_without_gradients(call):
    model = plain().train()

    def measure(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return 0.0

    call(model, plain(1), plain(2), plain(3), measure)
    assert model.training


def test_places_begin_with_the_same_random_numbers():
    torch.manual_seed(3)
    model = plain()
    line = loss_line(model, plain(1), plain(2), lambda model: torch.rand(()))
    assert len(set(line.values())) == 1


def test_half_precision_is_measured_in_half_precision():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    seen = []

    def measure(model):
        assert model.weight.dtype == torch.bfloat16
        seen.append(model.weight.item())
        return 0.0

    loss_line(model, [torch.tensor([[1.0]])], [torch.tensor([[1.25]])], measure, positions=[0.26])
    assert seen == [1, 1.25, 1.0625]


def test_overflow_in_batch_norm_is_a_hole():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    far = {"0.weight": torch.full((2, 4), 3e38)}
    own = dict(model.named_parameters())
    line = loss_line(
        model, None, own | far, lambda model: 1.0, bn_data=[torch.ones(3, 4)], positions=[]
    )
    assert line.values()[0] == 1
    assert np.isnan(line.values()[1])


# The model afterwards.


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_everything_is_restored_whatever_is_raised(trained, call, after):
    model, optimizer, first, second = trained
    model[0].eval()
    before = everything(model)
    left = iter(range(after + 1))

    def measure(model):
        model[1].running_mean.fill_(9)
        model[3].train()
        torch.rand(2), random.random(), np.random.rand()
        if next(left) == after:
            raise Stop
        return 0.0

    with pytest.raises(Stop):
        call(model, first, second, optimizer, measure, bn_data=DATA)
    assert unchanged(before, everything(model))


def test_training_goes_on_as_if_nothing_had_been_measured(call):
    trajectories = []
    for is_measured in (False, True):
        model, optimizer = averaging()
        train(model, optimizer, 5)
        first = copy.deepcopy(model.state_dict())
        train(model, optimizer, 2)
        if is_measured:
            call(model, first, None, optimizer, loss, bn_data=DATA)
        train(model, optimizer, 4)
        trajectories.append(values([*model.state_dict().values(), *optimizer.averaged_parameters]))
    assert same(*trajectories)


def test_a_backward_pass_may_wait_meanwhile(call):
    model = plain()
    waiting = squares(model)
    call(model, None, plain(1), plain(2), squares)
    waiting.backward()
    assert model[0].weight.grad is not None


def test_the_order_of_a_loader_goes_on(trained, call):
    model, optimizer, first, second = trained
    data = torch.utils.data.TensorDataset(torch.arange(32.0).reshape(8, 4))
    orders = []
    for is_measured in (False, True):
        loader = torch.utils.data.DataLoader(
            data, 2, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        if is_measured:
            call(model, first, second, optimizer, loss, bn_data=loader)
        orders.append([batch[0].tolist() for batch in loader])
    assert orders[0] == orders[1]


def test_inside_averaged_the_average_stays(trained):
    model, optimizer, first, _ = trained
    average = values(optimizer.averaged_parameters)
    with optimizer.averaged(model, bn_data=DATA):
        # Nothing warns, either, that somebody wrote to the averages.
        line = loss_line(model, None, first, loss, bn_data=DATA, positions=[])
        assert same(values(model.parameters()), average)
        with pytest.raises(SwappedError, match=r"first set of weights of loss_line\(\)"):
            loss_line(model, optimizer, first, loss, bn_data=DATA)
    assert np.isfinite(line.values()).all()
    assert same(optimizer.averaged_parameters, average)


def test_a_compiled_model_sees_the_weights():
    model = plain()
    compiled = torch.compile(model, backend="eager")
    some, other = plain(1), plain(2)
    line = loss_line(compiled, some.state_dict(), other, loss, positions=[])
    with torch.no_grad():
        assert line.values() == pytest.approx([float(loss(some)), float(loss(other))])


# Weights as people have them.


def test_every_form_of_weights_is_the_same(trained, tmp_path):
    model, optimizer, *_ = trained
    optimizer.save_average(tmp_path / "average.safetensors", model)
    other = network()
    other.load_state_dict(optimizer.averaged_state_dict(model))
    expected = {
        name: parameter.detach().numpy()
        for (name, _), parameter in zip(
            model.named_parameters(), optimizer.averaged_parameters, strict=True
        )
    }
    for given in (
        optimizer,
        optimizer.averaged_parameters,
        list(expected.values()),
        optimizer.averaged_state_dict(model),
        expected,
        other,
        other.parameters(),
        tmp_path / "average.safetensors",
        str(tmp_path / "average.safetensors"),
        load_average(tmp_path / "average.safetensors"),
        {f"_orig_mod.{name}": array for name, array in expected.items()},
    ):
        wrapped = isinstance(given, dict) and next(iter(given)).startswith("_")
        holder = torch.compile(model, backend="eager") if wrapped else model
        found = arrays_of(given, holder, "these")
        assert [*found.values()] != []
        for array, wanted in zip(found.values(), expected.values(), strict=True):
            np.testing.assert_array_equal(array, wanted)


def test_a_state_dict_of_the_model_itself_is_copied():
    # It shares the memory that the weights of each place are written to.
    model = plain()
    line = loss_line(model, model.state_dict(), plain(1), squares, positions=[-1, 0.5, 2])
    again = loss_line(
        model, copy.deepcopy(model.state_dict()), plain(1), squares, positions=[-1, 0.5, 2]
    )
    assert (line.values() == again.values()).all()


def test_tied_weights_have_either_name():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    weights = {"b.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.bias": torch.ones(2)}
    assert arrays_of(weights, model, "these")["a.weight"].tolist() == [[1, 1], [1, 1]]
    assert loss_line(model, None, weights, squares).length > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.ones(1, 2)}, "does not hold parameter 'bias'"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(1)}, r"'weight' has shape \(2, 2\)"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(1), "w": torch.ones(1)}, "holds 'w'"),
        ([torch.ones(1, 2)], "1 arrays, and the model has 2"),
    ],
)
def test_weights_of_another_model_are_refused(given, message):
    with pytest.raises(StructureError, match=message):
        loss_line(torch.nn.Linear(2, 1), None, given, squares)


def test_one_array_is_refused():
    with pytest.raises(TypeError, match="got one array"):
        loss_line(plain(), None, torch.ones(3), squares)


def test_an_average_without_a_snapshot_is_refused():
    model, optimizer = averaging()
    with pytest.raises(NothingAveragedError):
        loss_rays(model, optimizer, loss, bn_data=DATA)


def test_an_optimizer_of_another_model_is_refused(trained):
    _, optimizer, *_ = trained
    with pytest.raises(StructureError, match="none of the averages"):
        loss_rays(network(), optimizer, loss, bn_data=DATA)


def test_parameters_that_are_not_averaged_are_the_models():
    model = plain()
    optimizer = SWA(sgd(model[2]), {"start": "1step", "every": "1step"})
    squares(model).backward()
    optimizer.step()
    found = arrays_of(optimizer, model, "these")
    assert found["0.weight"].tolist() == model[0].weight.tolist()


def test_the_same_weights_are_refused():
    model = plain()
    with pytest.raises(GeometryError, match="are the same"):
        loss_line(model, None, model.state_dict(), squares)


def test_an_iterator_of_batches_is_refused(trained):
    model, _, first, second = trained
    with pytest.raises(TypeError, match="an iterator is empty"):
        loss_line(model, first, second, loss, bn_data=iter(DATA))


def test_lazy_and_meta_models_are_refused():
    with pytest.raises(StructureError, match="has no shape yet"):
        loss_rays(torch.nn.LazyLinear(2), None, squares)
    with pytest.raises(StructureError, match="on the meta device"):
        loss_rays(torch.nn.Linear(2, 2, device="meta"), None, squares)
    with pytest.raises(StructureError, match="no floating-point parameters"):
        loss_rays(torch.nn.ReLU(), None, squares)
