"""update_bn: the statistics of the pooled data, and nothing else changed."""

import collections
import random

import numpy as np
import pytest
import torch
from adapter_torch.training import same, values
from torch import nn

from swa_core import BatchNormError, SWAWarning
from swa_torch import update_bn


class Watched(nn.Module):
    """A network that remembers what reached its batch norm."""

    def __init__(self, norm, before=None):
        super().__init__()
        self.before = before or nn.Identity()
        self.norm = norm
        self.seen = []
        self.norm.register_forward_pre_hook(lambda layer, args: self.seen.append(args[0].detach()))

    def forward(self, x):
        return self.norm(self.before(x))

    def pooled(self):
        """Mean and unbiased variance of all that was seen, in float64."""
        channels = [x.double().movedim(1, 0).flatten(1) for x in self.seen]
        together = torch.cat(channels, 1)
        return together.mean(1), together.var(1)


def ragged(*shape, scale=1.0, shift=0.0):
    """Five batches, the last one small, whose means differ."""
    torch.manual_seed(1)
    return [scale * (torch.randn(n, *shape) + n) + shift for n in (16, 16, 16, 16, 3)]


def assert_exact(layer, mean, variance, rtol=1e-6):
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=0)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=rtol, atol=0)


class Sub(nn.BatchNorm2d):
    pass


KINDS = {
    "1d": (nn.BatchNorm1d(3), (3,)),
    "1d of sequences": (nn.BatchNorm1d(3), (3, 5)),
    "2d": (nn.BatchNorm2d(3), (3, 4, 5)),
    "3d": (nn.BatchNorm3d(3), (3, 2, 3, 4)),
    "sync": (nn.SyncBatchNorm(3), (3, 4)),
    "subclass": (Sub(3), (3, 4, 4)),
    "no affine": (nn.BatchNorm2d(3, affine=False), (3, 4, 4)),
    "cumulative": (nn.BatchNorm2d(3, momentum=None), (3, 4, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_pooled_data(kind):
    layer, shape = KINDS[kind]
    model = Watched(layer)
    with torch.no_grad():
        layer.running_mean.fill_(55.0)  # what was there before has no say
    momentum = layer.momentum
    update_bn(model, ragged(*shape))
    assert_exact(layer, *model.pooled())
    assert layer.num_batches_tracked == 5
    assert layer.momentum == momentum


def test_torchs_own_is_off_on_a_ragged_last_batch_and_ours_is_exact():
    data = ragged(3)
    ours, theirs = Watched(nn.BatchNorm1d(3)), Watched(nn.BatchNorm1d(3))
    update_bn(ours, data)
    torch.optim.swa_utils.update_bn(data, theirs)
    mean, variance = ours.pooled()
    assert_exact(ours.norm, mean, variance)
    assert (theirs.norm.running_mean - mean).abs().max() > 0.5
    assert (theirs.norm.running_var / variance).max() < 0.2


def test_a_large_mean_cancels_nothing():
    model = Watched(nn.BatchNorm1d(3))
    update_bn(model, ragged(3, scale=0.01, shift=1000.0))
    assert_exact(model.norm, *model.pooled())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_pooled_in_float64_too(dtype):
    model = Watched(nn.BatchNorm1d(3).to(dtype))
    update_bn(model, [x.to(dtype) for x in ragged(3)])
    mean, variance = model.pooled()
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert_exact(model.norm, mean, variance, tolerance)


def test_a_layer_that_is_used_twice_pools_both_uses():
    class Twice(Watched):
        def forward(self, x):
            return self.norm(2 * self.norm(x) + 5)

    model = Twice(nn.BatchNorm1d(3))
    update_bn(model, ragged(3))
    assert_exact(model.norm, *model.pooled())


def test_lazy_layers_are_built():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    update_bn(model, ragged(3))
    mean = torch.cat(ragged(3)).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)


Batch = collections.namedtuple("Batch", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        lambda x: {"x": x},
        lambda x: Batch(x, None),
    ],
    ids=["tensor", "tuple", "list", "dict", "namedtuple"],
)
@pytest.mark.parametrize("kind", [list, iter])
def test_batches_of_any_structure(wrap, kind):
    model = Watched(nn.BatchNorm1d(3))
    update_bn(model, kind([wrap(x) for x in ragged(3)]))
    assert_exact(model.norm, *model.pooled())


def test_forward_takes_any_other_batch():
    class Sample:
        def __init__(self, x):
            self.x = x

    model = Watched(nn.BatchNorm1d(3))
    data = [Sample(x) for x in ragged(3)]
    with pytest.raises(TypeError, match="forward=lambda model, batch"):
        update_bn(model, data)
    assert not model.norm.num_batches_tracked
    update_bn(model, data, forward=lambda model, sample: model(sample.x))
    assert_exact(model.norm, *model.pooled())


def test_batches_are_brought_to_the_models_device():
    # The meta device stands for another one: it refuses tensors of the cpu.
    moved = []
    model = nn.Sequential(nn.BatchNorm1d(3)).to("meta")

    def forward(model, batch):
        moved.extend([batch["x"].device.type, batch["more"][0].device.type, batch["n"]])
        return model(batch["x"])

    update_bn(model, [{"x": torch.ones(4, 3), "more": [torch.ones(1)], "n": 3}], forward=forward)
    assert moved == ["meta", "meta", 3]


def test_no_graph_is_kept_and_no_gradient_left():
    outputs = []
    model = Watched(nn.BatchNorm1d(3), nn.Linear(3, 3))
    update_bn(model, ragged(3), forward=lambda m, x: outputs.append(m(x)))
    assert not any(output.requires_grad for output in outputs)
    assert all(p.grad is None for p in model.parameters())


class Everything(nn.Module):
    """A model with all that a pass could change."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
        self.frozen = nn.BatchNorm1d(3).requires_grad_(False)
        self.resting = nn.BatchNorm1d(3)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.plain = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", torch.ones(3))
        self.resting.eval()
        with torch.no_grad():
            for layer in (self.frozen, self.resting):
                layer.running_mean.fill_(0.5)

    def forward(self, x):
        self.calls += 1
        self.mask = self.mask * 2
        random.random()
        np.random.rand()
        x = self.drop(self.first(x))
        x = self.instance(x.t()[None]).squeeze(0).t()
        return self.plain(self.spectral(self.resting(self.frozen(x))))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_as_before(fails):
    model = Everything()
    mask = model.mask
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        torch.cat(ragged(3)), batch_size=16, shuffle=True, generator=generator
    )
    own = ("first.running_mean", "first.running_var", "first.num_batches_tracked")

    def state():
        return [
            value.clone() for name, value in model.state_dict().items() if fails or name not in own
        ]

    def surroundings():
        return (
            torch.get_rng_state().tolist(),
            generator.get_state().tolist(),
            random.getstate(),
            repr(np.random.get_state()),
            [module.training for module in model.modules()],
            [len(module._forward_pre_hooks) for module in model.modules()],
        )

    before, outside = state(), surroundings()
    calls = []

    def forward(model, batch):
        calls.append(model.calls.item())
        assert model.first.training
        assert model.drop.training
        assert not model.frozen.training
        assert not model.resting.training
        model(batch)
        if fails and len(calls) == 3:
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            update_bn(model, loader, forward=forward)
    else:
        update_bn(model, loader, forward=forward)
        assert len(calls) == 5
        assert model.first.num_batches_tracked == 5
    assert same(state(), before)
    assert model.mask is mask
    assert surroundings() == outside


def test_a_model_wholly_in_evaluation_has_every_layer_updated():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)).eval()
    frozen = nn.BatchNorm1d(3).requires_grad_(False).eval()
    model.append(frozen)
    update_bn(model, ragged(3))
    assert [layer.num_batches_tracked.item() for layer in (model[0], model[2], frozen)] == [5, 5, 0]
    assert not any(module.training for module in model.modules())


def test_a_models_own_train_decides_what_it_keeps_in_evaluation():
    class Backbone(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    model = Backbone(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    update_bn(model, ragged(3))
    assert [layer.num_batches_tracked.item() for layer in model] == [0, 5]


def test_frozen_layers_normalise_with_what_they_have():
    model = Watched(nn.BatchNorm1d(3), nn.BatchNorm1d(3).requires_grad_(False))
    with torch.no_grad():
        model.before.running_mean.fill_(4.0)
    update_bn(model, ragged(3))
    expected = (torch.cat(ragged(3)) - 4.0).div(np.sqrt(1 + model.before.eps))
    torch.testing.assert_close(model.norm.running_mean, expected.mean(0))
    torch.testing.assert_close(model.norm.running_var, expected.var(0))


def test_no_batch_norm_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.warns(SWAWarning, match="Sequential has no batch norm") as said:
        update_bn(model, iter(["never looked at"]))
    assert said[0].filename == __file__


def test_only_frozen_batch_norm_says_so():
    model = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False))
    with pytest.warns(SWAWarning, match="every batch norm of Sequential is frozen"):
        update_bn(model, ragged(3))
    assert not model[0].num_batches_tracked
    assert model[0].training


def test_an_empty_loader_is_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(ragged(3)[0])
    before = values(model.buffers())
    read = iter(ragged(3))
    collections.deque(read, maxlen=0)
    for data in ([], read, torch.utils.data.DataLoader([])):
        with pytest.raises(BatchNormError, match="there are no batches"):
            update_bn(model, data)
        assert same(model.buffers(), before)


def test_one_value_per_channel_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = values(model.buffers())
    with pytest.raises(BatchNormError, match="batch 2 has one value per channel at layer '1'"):
        update_bn(model, [torch.randn(4, 3), torch.randn(1, 3)])
    assert same(model.buffers(), before)


def test_layers_that_no_batch_reaches():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Branches()
    with pytest.warns(SWAWarning, match="no batch reached unused"):
        update_bn(model, ragged(3))
    assert (model.used.num_batches_tracked, model.unused.num_batches_tracked) == (5, 0)
    before = values(model.buffers())
    with pytest.raises(BatchNormError, match="no batch reached any of the 2"):
        update_bn(model, ragged(3), forward=lambda model, batch: batch)
    assert same(model.buffers(), before)


@pytest.mark.parametrize("data", [torch.zeros(4, 3), {"x": torch.zeros(4, 3)}, "abc"])
def test_one_batch_is_not_taken_for_many(data):
    with pytest.raises(TypeError, match="put a single batch into a list"):
        update_bn(nn.Sequential(nn.BatchNorm1d(3)), data)


def test_compiled_models_are_seen_into():
    model = Watched(nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="eager")
    compiled(ragged(3)[0])
    model.seen.clear()
    update_bn(compiled, ragged(3))
    assert_exact(model.norm, *model.pooled())


def test_data_with_nan_is_refused_and_the_statistics_stay():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, affine=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(4, 2), torch.full((4, 2), float("nan"))]
    with pytest.raises(BatchNormError, match="would hold NaN or Inf"):
        update_bn(model, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
