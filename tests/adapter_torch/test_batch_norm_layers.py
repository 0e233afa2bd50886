"""update_bn sees what a layer normalises, whatever the layer is and whoever calls it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from swa_core import BatchNormError, SWAWarning
from swa_torch import update_bn


def batches(*shape):
    torch.manual_seed(1)
    return [torch.randn(n, *shape) + n for n in (8, 8, 3)]


def assert_statistics(layer, values, rtol=1e-6):
    """That the layer has those of ``values`` [batch, channels, ...]."""
    channels = values.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), channels.mean(1), rtol=rtol, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), channels.var(1), rtol=rtol, atol=0)


# Subclasses with a forward of their own.


class ChannelsLast(nn.BatchNorm1d):
    """Takes [batch, length, channels]."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Masked(nn.BatchNorm1d):
    """Padding is no data."""

    def forward(self, x, mask):
        normal = F.batch_norm(
            input=x[mask],
            running_mean=self.running_mean,
            running_var=self.running_var,
            weight=self.weight,
            bias=self.bias,
            training=self.training,
        )
        return x.masked_scatter(mask[..., None], normal)


class Inner(nn.BatchNorm1d):
    """Calls what F.batch_norm calls."""

    def forward(self, x):
        return torch.batch_norm(
            2 * x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            0.1,
            self.eps,
            False,
        )


class Split(nn.BatchNorm1d):
    """Has a second layer for the second half of each batch."""

    def __init__(self, channels):
        super().__init__(channels)
        self.other = nn.BatchNorm1d(channels)

    def forward(self, x):
        half = len(x) // 2
        return torch.cat([super().forward(x[:half]), self.other(x[half:])])


class OwnArithmetic(_BatchNorm):
    """Does without F.batch_norm."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, 0)
        return (x - mean) / (variance + self.eps).sqrt()


class Fixed(nn.BatchNorm1d):
    """Never takes the batch's statistics."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_a_layer_that_permutes_its_input():
    model = nn.Sequential(ChannelsLast(3))
    data = [x.transpose(1, 2) for x in batches(3, 3)]  # as long as it is wide: shapes do not tell
    update_bn(model, data)
    assert_statistics(model[0], torch.cat(data).transpose(1, 2))
    assert "forward" not in vars(model[0])


def test_a_layer_that_masks_its_input():
    model = Masked(3)
    data = [{"x": x, "mask": x[..., 0] > x.mean()} for x in batches(4, 3)]
    update_bn(model, data)
    assert_statistics(model, torch.cat([batch["x"][batch["mask"]] for batch in data]))


def test_a_layer_that_calls_the_inner_function():
    model = Inner(3)
    update_bn(model, batches(3))
    assert_statistics(model, 2 * torch.cat(batches(3)))


def test_a_layer_within_a_layer():
    model = Split(3)
    data = batches(3, 2)
    update_bn(model, data)
    assert_statistics(model, torch.cat([x[: len(x) // 2] for x in data]))
    assert_statistics(model.other, torch.cat([x[len(x) // 2 :] for x in data]))


def test_a_layer_with_its_own_arithmetic():
    model = OwnArithmetic(3)
    update_bn(model, batches(3))
    assert_statistics(model, torch.cat(batches(3)))


def test_a_layer_that_never_takes_the_batchs_statistics_is_left_alone():
    model = nn.Sequential(Fixed(3), nn.BatchNorm1d(3))
    update_bn(model, batches(3))
    assert [layer.num_batches_tracked.item() for layer in model] == [0, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_bn(nn.Sequential(Fixed(3)), batches(3))


def test_a_forward_that_was_put_on_the_layer_is_called_and_stays():
    layer = nn.BatchNorm1d(3)
    calls = []
    original = layer.forward
    layer.forward = lambda x: calls.append(0) or original(x + 1)
    patched = layer.forward
    update_bn(nn.Sequential(layer), batches(3))
    assert_statistics(layer, torch.cat(batches(3)) + 1)
    assert len(calls) == 3
    assert layer.forward is patched


def test_an_input_of_other_channels_is_named():
    with pytest.raises(BatchNormError, match=r"batch 1 reaches layer '0' with shape \(8, 4\)"):
        update_bn(nn.Sequential(nn.BatchNorm1d(3, affine=False)), batches(4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):  # torch's own words
        update_bn(nn.Sequential(nn.BatchNorm1d(3)), [torch.zeros(3)])


# Other layers that keep statistics.


def test_instance_norm_and_frozen_look_alikes_keep_theirs():
    class FrozenBatchNorm2d(nn.Module):  # as detection models have it: buffers, no batch norm
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.full((3,), 5.0))

        def forward(self, x):
            return x - self.running_mean[:, None]

    model = nn.Sequential(
        nn.InstanceNorm1d(3, track_running_stats=True), FrozenBatchNorm2d(), nn.BatchNorm1d(3)
    )
    update_bn(model, batches(3, 5))
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert not model[0].num_batches_tracked
    assert torch.equal(model[1].running_mean, torch.full((3,), 5.0))
    assert model[2].num_batches_tracked == 3


def test_without_statistics_nothing_is_kept():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    update_bn(model, batches(3))
    assert model[0].running_mean is None
    assert model[1].num_batches_tracked == 3


# Who calls the layer, and how.


def test_a_shared_layer_pools_all_its_calls():
    shared = nn.BatchNorm1d(3)

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Sequential(shared), nn.Sequential(shared)

        def forward(self, x):
            return self.left(x) + self.right(-3 * x)

    update_bn(Siamese(), batches(3))
    assert_statistics(shared, torch.cat([scale * x for x in batches(3) for scale in (1, -3)]))
    assert shared.num_batches_tracked == 6


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_block_counts_once(use_reentrant):
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    update_bn(
        block,
        batches(3),
        forward=lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant),
    )
    assert block[1].num_batches_tracked == 3


def test_autocast():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seen = []
    model[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))

    def forward(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)

    update_bn(model, batches(3), forward=forward)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert_statistics(model[1], torch.cat(seen))


def test_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    data = [x.contiguous(memory_format=torch.channels_last) for x in batches(3, 5, 6)]
    seen = []
    model[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    update_bn(model, data)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert_statistics(model[1], torch.cat(seen))


def test_a_keyword_argument():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=x)

    model = Model()
    update_bn(model, batches(3))
    assert_statistics(model.norm, torch.cat(batches(3)))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), ChannelsLast(3)], ids=["torch's", "own"])
def test_a_compiled_model_is_not_compiled_again(layer):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = torch.compile(nn.Sequential(layer), backend=backend)
    data = batches(3, 3)[:2]
    update_bn(model, data)
    assert not compilations
    model(data[0])
    assert len(compilations) == 1
    update_bn(model, data)
    assert layer.num_batches_tracked == 2
    model(data[0])
    assert len(compilations) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "script",
    [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(4, 3))],
    ids=["scripted", "traced"],
)
def test_scripted_layers_are_refused(script):
    scripted = script(nn.Sequential(nn.BatchNorm1d(3)))
    model = nn.Sequential(scripted, nn.BatchNorm1d(3))
    before = [module.training for module in model.modules()]
    with pytest.raises(BatchNormError, match=r"layer '0\.0' is scripted or traced"):
        update_bn(model, batches(3))
    assert [module.training for module in model.modules()] == before
    # A feature extractor in evaluation is a frozen layer like any other.
    scripted.eval()
    update_bn(model, batches(3))
    assert model[1].num_batches_tracked == 3
    with pytest.warns(SWAWarning, match="has no batch norm"):
        update_bn(script(nn.Sequential(nn.Linear(3, 3))), batches(3))


def test_data_parallel_computes_where_the_layers_are():
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm1d(3)))
    model.device_ids = [0, 1]  # as on a machine with two GPUs: it would copy the layers to both
    update_bn(model, batches(3))
    assert_statistics(model.module[0], torch.cat(batches(3)))
    assert model.device_ids == [0, 1]


# Layers that are built by the first batch.


def test_lazy_layers_that_were_built_in_vain_are_as_new():
    model = nn.Sequential(nn.LazyBatchNorm1d())

    def forward(model, x):
        model(x)
        if len(x) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        update_bn(model, batches(3), forward=forward)
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert torch.equal(model[0].running_var, torch.ones(3))
    assert not model[0].num_batches_tracked


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_all_kinds_of_lazy_layers(lazy):
    data = batches(3, *(2,) * int(lazy.__name__[-2]))
    model = nn.Sequential(lazy())
    update_bn(model, data)
    assert_statistics(model[0], torch.cat(data))
    assert model[0].num_batches_tracked == 3


# Whatever is raised.


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["the data", "forward", "a hook", "the layer"])
@pytest.mark.parametrize("was_training", [True, False])
def test_whatever_is_raised_leaves_no_trace(error, where, was_training):
    class Failing(ChannelsLast):
        def forward(self, x):
            return fail("the layer", super().forward(x))

    def fail(here, value=None):
        if here == where and len(seen) == 2:
            raise error
        return value

    def data():
        for x in batches(3, 3):
            seen.append(torch.rand(1))
            yield fail("the data", x)

    seen = []
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), Failing(3), nn.Dropout(0.5))
    model[0].register_forward_hook(lambda *_: fail("a hook"))
    model.train(was_training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(error):
        update_bn(model, data(), forward=lambda model, x: fail("forward", model(x)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert {module.training for module in model.modules()} == {was_training}
    assert model[0].momentum is None
    assert "forward" not in vars(model[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_random_numbers_of_the_device_are_as_before(device):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).to(device)
    state = {"cpu": torch.get_rng_state, "cuda": torch.cuda.get_rng_state}[device]
    data = batches(3)
    before = state()
    update_bn(model, data)
    assert torch.equal(state(), before)
    assert_statistics(model[0].cpu(), torch.cat(data))
