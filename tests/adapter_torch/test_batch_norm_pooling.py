"""The pooling of batch-norm statistics: exact, of any memory format, and without waiting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swa_core import BatchNormError
from swa_torch import pooling, update_bn
from swa_torch.pooling import Pool, moments


def exactly(values):
    """Mean and summed squared deviations in float64, channel by channel."""
    channels = values.double().movedim(1, 0).flatten(1)
    mean = channels.mean(1)
    return mean, (channels - mean[:, None]).square().sum(1)


def pooled(*batches):
    pool = Pool("norm")
    for batch in batches:
        pool.add(batch)
    return pool.mean, pool.squares


def pooled_elsewhere(*batches):
    """As it is done on other devices than the CPU."""
    pool = Pool("norm")
    for batch in batches:
        pool.merge(batch.numel() // batch.shape[1], *moments(batch))
    return pool.mean, pool.squares


def assert_close(found, expected, rtol=1e-12, atol=0.0):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    shift=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    seed=st.integers(0, 2**20),
)
def test_any_split_gives_the_statistics_of_the_pooled_data(sizes, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    total = max(sum(sizes), 2)
    data = torch.randn(total, 3, dtype=torch.float64, generator=generator) + shift
    model = nn.BatchNorm1d(3).double()
    pool = Pool("norm")
    for batch in data.split([*sizes, 1] if sum(sizes) < 2 else sizes):
        pool.add(batch)
    mean, squares = exactly(data)
    # Of what lies `shift` away from 0, float64 itself keeps no more than this.
    spread = 1e-15 * abs(shift) + 1e-14
    torch.testing.assert_close(pool.mean, mean, rtol=1e-14, atol=spread)
    torch.testing.assert_close(pool.squares, squares, rtol=1e-12, atol=total * spread)
    if all(size > 1 for size in sizes):
        update_bn(model, data.split(sizes))
        torch.testing.assert_close(model.running_mean, mean, rtol=1e-14, atol=spread)
        variance = squares / (total - 1)
        torch.testing.assert_close(model.running_var, variance, rtol=1e-12, atol=2 * spread)


LAYOUTS = {
    "2d": lambda x: x[:, :, 0, 0],
    "3d": lambda x: x[:, :, 0],
    "4d": lambda x: x,
    "5d": lambda x: x[:, :, None],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels last in 3d": lambda x: x[:, :, None].to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 3),
    "a slice": lambda x: x[::2, :, 1:, ::3],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "one channel": lambda x: x[:, :1],
}


@pytest.mark.parametrize("pool", [pooled, pooled_elsewhere])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [0, 10**6])
def test_any_memory_format(pool, layout, few, monkeypatch):
    monkeypatch.setattr(pooling, "_FEW", few)
    torch.manual_seed(0)
    values = LAYOUTS[layout](torch.randn(6, 5, 4, 7, dtype=torch.float64) + 3)
    assert_close(pool(values[:2], values[2:]), exactly(values))


@pytest.mark.parametrize("pool", [pooled, pooled_elsewhere])
@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
def test_narrow_values_lose_nothing_that_matters(pool, few, dtype, mean, monkeypatch):
    monkeypatch.setattr(pooling, "_FEW", few)
    torch.manual_seed(0)
    data = (torch.randn(64, 3, 40) + mean).to(dtype)
    found = pool(*data.split([32, 30, 2]))
    exact_mean, squares = exactly(data)
    spread = (squares / 2560).sqrt()
    assert ((found[0] - exact_mean).abs() <= 1e-7 * spread).all()
    assert_close([found[1]], [squares], rtol=1e-7)


@pytest.mark.parametrize("pool", [pooled, pooled_elsewhere])
@pytest.mark.parametrize("few", [0, 10**6])
def test_batches_far_apart_lose_nothing_that_matters(pool, few, monkeypatch):
    monkeypatch.setattr(pooling, "_FEW", few)
    torch.manual_seed(0)
    means = [1e4, *[0.0] * 60, -1e4]
    data = [torch.randn(8, 3) + mean for mean in means]
    assert_close(pool(*data), exactly(torch.cat(data)), rtol=1e-7, atol=1e-5)


def test_a_large_batch_is_looked_at_in_pieces(monkeypatch):
    torch.manual_seed(0)
    values = torch.randn(10, 3, 4, dtype=torch.float64) * torch.arange(10)[:, None, None]
    monkeypatch.setattr(pooling, "_PIECE_ON_CPU", 25)
    assert [len(piece) for piece in pooling._pieces(values)] == [2] * 5
    pool = Pool("norm")
    pool.add(values)
    assert (pool.count, pool.batches) == (40, 1)
    assert_close([pool.mean, pool.squares], exactly(values), rtol=1e-11)


def test_constant_data_has_no_variance():
    model = nn.BatchNorm1d(2).double()
    update_bn(model, [torch.full((7, 2), 0.1, dtype=torch.float64) for _ in range(5)])
    assert torch.equal(model.running_var, torch.zeros(2, dtype=torch.float64))
    pool = Pool("norm")
    pool.merge(7, torch.ones(1), torch.tensor([-1e-30]))  # what rounding could leave
    assert pool.variance() == 0


def test_empty_batches_count_for_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    data = torch.randn(5, 3)
    update_bn(model, [torch.empty(0, 3), data, torch.empty(0, 3)])
    torch.testing.assert_close(model[0].running_mean, data.mean(0))
    assert model[0].num_batches_tracked == 1


class Waits(TorchDispatchMode):
    """Counts how often a value is read back from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_wait_for_the_device_per_layer_or_batch(momentum):
    def waits(n_layers, n_batches):
        model = nn.Sequential(*(nn.BatchNorm1d(3, momentum=momentum) for _ in range(n_layers)))
        with Waits() as mode:
            update_bn(model, [torch.randn(4, 3) for _ in range(n_batches)])
        return mode.count

    assert waits(1, 1) == waits(6, 1) == waits(1, 6) == waits(6, 6)
    # The meta device has no values to wait for: reading one is an error.
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.Conv2d(3, 3, 1)).to("meta")
    update_bn(model, [torch.randn(4, 3, 2, 2) for _ in range(3)])
    assert model[0].momentum == momentum


def test_statistics_that_the_dtype_of_the_layer_cannot_hold_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    with pytest.raises(BatchNormError, match="a variance may also be too large"):
        update_bn(model, [torch.tensor([[0.0, 1.0], [3e4, 2.0]]).half()])
    assert torch.equal(model[0].running_var, torch.ones(2).half())
