"""Batch-norm statistics of flax models, against those of the pooled data in float64."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swa_core import BatchNormError, SWAWarning
from swa_optax import update_bn

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # flax promotes


class Net(nn.Module):
    """One layer over images and one over features; the second sees what the first made of them."""

    momentum: float = 0.99
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3))(x)
        frozen = not train or self.frozen
        x = nn.BatchNorm(use_running_average=frozen, momentum=self.momentum, name="images")(x)
        x = nn.relu(x).mean((1, 2))
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="features")(x)


def data(sizes=(8, 8, 8, 3), side=4, seed=0, far=0.0):
    rng = np.random.default_rng(seed)
    return [
        (far + place + rng.standard_normal((n, side, side, 2))).astype(np.float32)
        for place, n in enumerate(sizes)
    ]


def make(net, batches):
    variables = net.init(jax.random.key(0), batches[0], train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def apply(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return apply, params, jax.tree.map(lambda leaf: leaf + 0.5, stats)


def inputs_of(net, params, stats, batches, layer):
    """What a layer sees in training mode, float64, all batches and places in one."""
    seen = []
    for batch in batches:
        variables = {"params": params, "batch_stats": stats}
        kept = net.apply(
            variables,
            batch,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )[1]["intermediates"]
        of_layer = kept["Conv_0"] if layer == "images" else kept["images"]
        x = np.asarray(of_layer["__call__"][0], np.float64)
        seen.append(np.maximum(x, 0).mean((1, 2)) if layer == "features" else x)
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in seen])


def assert_pooled(new, net, params, stats, batches, layers=("images", "features")):
    for layer in layers:
        x = inputs_of(net, params, stats, batches, layer)
        for name, expected in (("mean", x.mean(0)), ("var", x.var(0))):
            got = np.asarray(new[layer][name], np.float64)
            np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6, err_msg=layer)


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.999, 1 - 1 / 3, 0.0])
def test_is_that_of_the_pooled_data_with_a_ragged_last_batch(momentum):
    net, batches = Net(momentum), data()
    apply, params, stats = make(net, batches)
    new = update_bn(jax.tree_util.Partial(apply, params), stats, iter(batches))
    assert_pooled(new, net, params, stats, batches)
    # The average of the batches' variances, which momentum gives, is another number.
    x = inputs_of(net, params, stats, batches, "images")
    sizes = np.cumsum([len(batch) * 16 for batch in batches])[:-1]
    naive = np.mean([part.var(0) for part in np.split(x, sizes)], axis=0)
    assert np.max(np.abs(naive / x.var(0) - 1)) > 0.05


def test_a_function_and_a_partial_give_the_same():
    net, batches = Net(), data()
    apply, params, stats = make(net, batches)
    partial = update_bn(jax.tree_util.Partial(apply, params), stats, batches)
    closure = update_bn(lambda stats, batch: apply(params, stats, batch), stats, batches)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, partial, closure)


def test_other_parameters_are_seen_each_time():
    # A compiled forward must not be taken for another one that is equal to it.
    net, batches = Net(), data()
    apply, params, stats = make(net, batches)

    class Model:
        def forward(self, stats, batch):
            return apply(self.params, stats, batch)

    model, results = Model(), []
    for factor in (1, 2):
        model.params = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        results.append(update_bn(model.forward, stats, batches))
        assert_pooled(results[-1], net, model.params, stats, batches)


def test_a_partial_is_compiled_once():
    net, batches = Net(), data((4, 4))
    apply, params, stats = make(net, batches)
    traced = []

    def counted(params, stats, batch):
        traced.append(1)
        return apply(params, stats, batch)

    for factor in (1, 2, 3):
        scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        update_bn(jax.tree_util.Partial(counted, scaled), stats, batches)
        assert len(traced) == 1


def test_frozen_layers_are_left_alone_and_used():
    net, batches = Net(frozen=True), data()
    apply, params, stats = make(net, batches)
    new = update_bn(jax.tree_util.Partial(apply, params), stats, batches)
    jax.tree.map(np.testing.assert_array_equal, new["images"], stats["images"])
    assert_pooled(new, net, params, stats, batches, layers=["features"])


def test_a_mean_far_from_zero():
    def apply(stats, x):
        # Centred in float64 on the host, so that only the pooling is judged.
        new = {"mean": x.mean(0), "var": jnp.square(x - x.mean(0)).mean(0)}
        return jax.tree.map(lambda old, of_batch: 0.99 * old + 0.01 * of_batch, stats, new)

    batches = [batch.reshape(len(batch), -1) for batch in data(far=1000.0)]
    stats = {"mean": jnp.zeros(32), "var": jnp.ones(32)}
    new = update_bn(apply, stats, batches)
    x = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(new["mean"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(new["var"], x.var(0), rtol=1e-3)


def test_weights_by_size_where_shapes_vary():
    net = Net()
    batches = [data((8,), side=4)[0], data((8,), side=6, seed=1)[0], data((3,), side=2)[0]]
    apply, params, stats = make(net, batches)
    forward = jax.tree_util.Partial(apply, params)
    with pytest.raises(BatchNormError, match=r"batch 2 has the shapes \[\(6, 6, 2\)\]") as error:
        update_bn(forward, stats, batches)
    assert "Hint: say size=" in str(error.value)
    new = update_bn(forward, stats, batches, size=lambda x: x.shape[0] * x.shape[1] * x.shape[2])
    assert_pooled(new, net, params, stats, batches, layers=["images"])


def test_batches_of_several_arrays_and_empty_ones():
    net, batches = Net(), data()
    apply, params, stats = make(net, batches)
    empty = np.zeros((0, *batches[0].shape[1:]), np.float32)
    loader = [{"x": x, "label": np.zeros(len(x), int), "step": 3} for x in [empty, *batches, empty]]
    new = update_bn(lambda stats, batch: apply(params, stats, batch["x"]), stats, loader)
    assert_pooled(new, net, params, stats, batches)


def test_everything_else_is_left_as_it_is():
    def apply(stats, x):
        mean = 0.9 * stats["bn"]["mean"] + 0.1 * x.mean(0)
        var = 0.9 * stats["bn"]["var"] + 0.1 * x.var(0)
        other = {"sigma": stats["sn"]["sigma"] + 1, "mean": stats["sn"]["mean"] + 1}
        return {"bn": {"mean": mean, "var": var}, "sn": other, "seen": stats["seen"] + 1}

    stats = {
        "bn": {"mean": jnp.zeros(2, jnp.bfloat16), "var": jnp.ones(2)},
        "sn": {"sigma": jnp.ones(2), "mean": jnp.ones(2)},
        "seen": jnp.array(3),
    }
    before = jax.tree.map(np.array, stats)
    x = np.float32([[1, 2], [3, 6]])
    new = update_bn(apply, stats, [x])
    assert new["sn"] == stats["sn"]
    assert new["seen"] is stats["seen"]
    assert new["bn"]["mean"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["bn"]["mean"], [2, 4])
    np.testing.assert_allclose(new["bn"]["var"], [1, 4], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, before)


def test_float64_statistics(strict_jax):
    with jax.enable_x64(True):

        def apply(stats, x):
            new = {"mean": x.mean(0), "var": x.var(0)}
            return jax.tree.map(lambda old, of_batch: 0.99 * old + 0.01 * of_batch, stats, new)

        batches = [batch.astype(np.float64).reshape(len(batch), -1) for batch in data()]
        new = update_bn(apply, {"mean": jnp.zeros(32), "var": jnp.ones(32)}, batches)
        x = np.concatenate(batches)
        assert new["var"].dtype == np.float64
        np.testing.assert_allclose(new["mean"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(new["var"], x.var(0), rtol=1e-12)


def test_no_data_is_an_error():
    apply, params, stats = make(Net(), data())
    for batches in ([], iter(()), [np.zeros((0, 4, 4, 2), np.float32)]):
        with pytest.raises(BatchNormError, match="at least one batch"):
            update_bn(jax.tree_util.Partial(apply, params), stats, batches)


@pytest.mark.parametrize("stats", [{}, {"sn": {"sigma": jnp.ones(2)}}, {"mean": jnp.ones(2)}, None])
def test_no_batch_norm_is_no_work_with_a_warning(stats):
    def fails(*_):
        raise AssertionError

    with pytest.warns(SWAWarning, match="nothing to do") as caught:
        assert update_bn(fails, stats, map(fails, [1])) is stats
    assert caught[0].filename == __file__


@pytest.mark.parametrize("wrong", [np.zeros((8, 4, 4, 2), np.float32), {"x": np.zeros((8, 2))}])
def test_one_batch_instead_of_batches_is_an_error(wrong):
    apply, params, stats = make(Net(), data())
    with pytest.raises(BatchNormError, match=r"Hint: pass \[batch\]"):
        update_bn(jax.tree_util.Partial(apply, params), stats, wrong)


@pytest.mark.parametrize(
    "batch", [(np.zeros((8, 4)), np.zeros(7)), 3, []], ids=["lengths", "scalar", "empty"]
)
def test_a_batch_of_unknown_size_is_an_error(batch):
    with pytest.raises(BatchNormError, match="the size of batch 1 cannot be told"):
        update_bn(lambda stats, _: stats, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, [batch])


@pytest.mark.parametrize("size", [np.nan, -1, np.inf])
def test_a_size_that_is_none_is_an_error(size):
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    with pytest.raises(BatchNormError, match="size gave"):
        update_bn(lambda stats, _: stats, stats, data(), size=lambda batch: size)


def test_a_forward_in_evaluation_mode_is_an_error():
    net, batches = Net(), data()
    _, params, stats = make(net, batches)

    def evaluate(stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, batch, train=False, mutable=["batch_stats"])[1]["batch_stats"]

    with pytest.raises(BatchNormError, match="must run in training mode"):
        update_bn(evaluate, stats, batches)


def test_a_forward_that_returns_something_else_is_an_error():
    net, batches = Net(), data()
    apply, params, stats = make(net, batches)
    with pytest.raises(BatchNormError, match=r'changed\["batch_stats"\]'):
        update_bn(lambda s, x: {"batch_stats": apply(params, s, x)}, stats, batches)


def test_what_keeps_no_running_average_is_an_error():
    stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

    def renormalises(stats, x):
        new = {"mean": x.mean(0), "var": x.var(0) * jnp.sqrt(1 + stats["var"])}
        return jax.tree.map(lambda old, of_batch: 0.9 * old + 0.1 * of_batch, stats, new)

    with pytest.raises(BatchNormError, match="'var' is no running average"):
        update_bn(renormalises, stats, [np.float32([[1, 2], [3, 6]])])


def test_nan_in_the_data_is_an_error_with_the_path():
    net, batches = Net(), data()
    apply, params, stats = make(net, batches)
    batches[1][0, 0, 0, 0] = np.nan
    with pytest.raises(BatchNormError, match="'features/mean' hold NaN"):
        update_bn(jax.tree_util.Partial(apply, params), stats, batches)


def test_statistics_too_coarse_to_tell_their_momentum_are_an_error():
    def apply(stats, x):
        new = {"mean": x.mean(0), "var": x.var(0)}
        return jax.tree.map(lambda old, b: (0.9 * old + 0.1 * b).astype(jnp.bfloat16), stats, new)

    stats = {"mean": jnp.zeros(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(BatchNormError, match="kept in bfloat16"):
        update_bn(apply, stats, [np.float32([[1, 2], [3, 6]])])
