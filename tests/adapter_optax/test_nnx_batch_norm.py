"""``update_bn`` on models of flax nnx: new statistics, and nothing else that is new."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.test_nnx import assert_same, everything
from flax import nnx
from jax.tree_util import Partial

from swa_core import BatchNormError, SWAWarning
from swa_optax import averaged_params, swa, update_bn

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # flax promotes

RNG = np.random.default_rng(0)
BATCHES = [np.float32(1 + RNG.standard_normal((n, 4, 4, 2))) for n in (6, 6, 3)]  # two compilations
STATISTICS = [(layer, name) for layer in ("images", "features") for name in ("mean", "var")]


class Net(nnx.Module):
    """Two batch norms of different momenta, dropout behind both, and a counter of its calls."""

    def __init__(self, rate=0.0):
        rngs = nnx.Rngs(0, dropout=1)
        self.mix = nnx.Linear(2, 3, rngs=rngs)
        self.images = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.features = nnx.BatchNorm(3, rngs=rngs)
        self.last = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))
        self.noise = nnx.BatchStat(jnp.array(0.0))  # no pair of mean and variance

    def __call__(self, x):
        self.calls[...] += 1
        self.noise[...] += 1
        x = nnx.relu(self.images(self.mix(x)))
        return self.last(self.features(self.dropout(x).mean((1, 2))))


def run(model, batch):
    return model(batch)


forward = Partial(run)  # compiled once for all tests that take it, the slowest part of each


def inputs(model, batches):
    """What the layers see in training mode, without dropout, float64."""
    images, features = [], []
    for batch in batches:
        x = np.float64(model.mix(batch))
        images.append(x.reshape(-1, 3))
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        features.append(np.maximum((x - mean) / np.sqrt(var + 1e-5), 0).mean((1, 2)))
    return {"images": np.concatenate(images), "features": np.concatenate(features)}


def assert_pooled(model, batches, layers=("images", "features")):
    for layer, x in inputs(model, batches).items():
        if layer in layers:
            bn = getattr(model, layer)
            np.testing.assert_allclose(bn.mean[...], x.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(bn.var[...], x.var(0), rtol=1e-5, atol=1e-6)


def flags(model):
    return [
        (part.deterministic if isinstance(part, nnx.Dropout) else part.use_running_average)
        for part in (model.images, model.dropout, model.features, model.last)
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kept", [False, True], ids=["function", "partial"])
def test_the_model_ends_with_pooled_statistics_and_nothing_else_is_new(mode, kept):
    model = Net()
    getattr(model, mode)()
    before, flags_before = everything(model), flags(model)
    got = update_bn(forward if kept else run, model, iter(BATCHES))
    assert got is model
    assert_pooled(model, BATCHES)
    assert_same(everything(model), before, but=STATISTICS)
    assert flags(model) == flags_before


def test_a_partial_is_compiled_once_for_all_weights():
    traced = []

    def counted(model, batch):
        traced.append(1)
        model(batch)

    model = Net()
    for factor in (1.0, 2.0, 3.0):
        model.mix.kernel[...] *= factor
        update_bn(Partial(counted), model, BATCHES[:2])
        assert_pooled(model, BATCHES[:2])
    assert len(traced) == 1
    update_bn(counted, model, BATCHES[:2])
    assert len(traced) == 2


def test_frozen_layers_are_left_alone_and_used():
    model = Net()
    model.images.mean[...] += 1.0
    model.images.use_running_average = True
    before = everything(model)
    update_bn(forward, model, BATCHES)
    assert_same(everything(model), before, but=STATISTICS[2:])
    x = np.concatenate([np.float64(model.mix(batch)) for batch in BATCHES])
    seen = np.maximum((x - 1) / np.sqrt(1 + 1e-5), 0).mean((1, 2))
    np.testing.assert_allclose(model.features.mean[...], seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.features.var[...], seen.var(0), rtol=1e-5, atol=1e-6)


def test_dropout_draws_other_numbers_for_each_batch_and_the_same_in_each_pass():
    model = Net(rate=0.5)
    update_bn(forward, model, BATCHES[:1])
    once = everything(model)
    update_bn(forward, model, [BATCHES[0]] * 2)
    twice = everything(model)
    assert not np.array_equal(once["features", "mean"], twice["features", "mean"])
    assert_same({k: once[k] for k in STATISTICS[:2]}, {k: twice[k] for k in STATISTICS[:2]})
    update_bn(forward, model, [BATCHES[0]] * 2)
    assert_same(everything(model), twice)


def test_layers_stacked_by_vmap():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    model = nnx.vmap(Stack)(nnx.Rngs(0).split(2))
    assert model.dropout.rngs.key.shape == (2,)
    before = everything(model)

    def over_layers(model, batch):
        nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))(model, jnp.stack([batch, 3 * batch]))

    update_bn(over_layers, model, BATCHES[:2])
    assert_same(everything(model), before, but=[("norm", "mean"), ("norm", "var")])
    x = np.concatenate(BATCHES[:2]).astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(model.norm.mean[...], [x.mean(0), 3 * x.mean(0)], rtol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], [x.var(0), 9 * x.var(0)], rtol=1e-5)


def test_several_models_in_a_dictionary():
    models = {"a": Net(), "b": Net()}

    def both(models, batch):
        models["b"](models["a"](batch)[:, None, None, :2])

    update_bn(both, models, BATCHES[:2])
    assert_pooled(models["a"], BATCHES[:2])
    assert not np.array_equal(models["b"].images.mean[...], np.zeros(3))


def test_a_mask_and_batches_of_several_arrays():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    batches = [{"x": b.reshape(-1, 2), "m": RNG.random(b.size // 2) < 0.5} for b in BATCHES]
    update_bn(
        lambda model, batch: model(batch["x"], mask=batch["m"][:, None]),
        model,
        batches,
        size=lambda batch: batch["m"].sum(),
    )
    x = np.float64(np.concatenate([batch["x"][batch["m"]] for batch in batches]))
    np.testing.assert_allclose(model.mean[...], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.var[...], x.var(0), rtol=1e-5)


def test_what_is_averaged_in_an_optimizer_gets_its_statistics():
    model = Net()
    tx = optax.chain(optax.sgd(0.1), swa({"start": "1step", "every": "1step"}))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(lambda model: jnp.square(model(batch) - 1).mean())(model))

    for batch in BATCHES[:2] * 2:
        step(model, optimizer, batch)
    trained = everything(model)
    averaged = averaged_params(optimizer, model)
    averaged.eval()
    assert update_bn(forward, averaged, BATCHES) is averaged
    assert_pooled(averaged, BATCHES, layers=["images"])
    assert_same(everything(model), trained)


def raises(*_):
    raise ValueError("mine")


def broken(number):
    yield from BATCHES[:number]
    raise ValueError("mine")


BAD = {
    "a forward that raises": (raises, BATCHES, ValueError, "mine"),
    "data that end in an error": (forward, broken(2), ValueError, "mine"),
    "no data": (forward, [], BatchNormError, "at least one batch"),
    "one batch": (forward, BATCHES[0], BatchNormError, r"pass \[batch\]"),
    "NaN": (forward, [BATCHES[0], BATCHES[1] * np.nan], BatchNormError, "'features/mean' hold NaN"),
    "no forward": (lambda *_: None, BATCHES, BatchNormError, "changed no running statistics"),
    "twice": (
        lambda model, batch: (model(batch), model(batch)),
        BATCHES,
        BatchNormError,
        "'features/mean' is updated 2 times",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_raised_the_model_is_as_it_was(bad):
    apply, data, error, message = BAD[bad]
    model = Net()
    before, flags_before = everything(model), flags(model)
    with pytest.raises(error, match=message):
        update_bn(apply, model, data)
    assert_same(everything(model), before)
    assert flags(model) == flags_before


def test_a_forward_of_another_model_and_a_call_inside_of_jit_are_refused():
    model = Net()
    before = everything(model)
    with pytest.raises(Exception, match="from a different trace level"):  # flax says it
        update_bn(lambda _, batch: model(batch), model, BATCHES)
    with pytest.raises(BatchNormError, match="inside of jit"):
        nnx.jit(lambda model: update_bn(forward, model, BATCHES))(model)
    assert_same(everything(model), before)


def test_a_model_without_batch_norm_is_no_work_with_a_warning():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.warns(SWAWarning, match="nothing to do") as caught:
        assert update_bn(raises, model, BATCHES) is model
    assert caught[0].filename == __file__
    assert "model has no" in str(caught[0].message)


def test_the_state_of_a_model_is_a_collection_too():
    model = Net()
    structure, stats, others = nnx.split(model, nnx.BatchStat, ...)

    def apply(stats, batch):
        net = nnx.merge(structure, stats, others, copy=True)
        net(batch)
        return nnx.state(net, nnx.BatchStat)

    new = update_bn(apply, stats, BATCHES)
    assert type(new) is nnx.State
    nnx.update(model, new)
    assert_pooled(model, BATCHES)


def test_random_numbers_in_any_form_are_left_alone():
    model = nnx.Dict(norm=nnx.BatchNorm(2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(3))
    before = everything(model)

    def noisy(model, batch):
        model.norm(batch + jax.random.normal(model.rngs.noise(), batch.shape))

    update_bn(noisy, model, BATCHES[:1])
    assert_same(everything(model), before, but=[("norm", "mean"), ("norm", "var")])
