"""``update_bn`` on every way in which flax's linen runs a batch norm, against float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from swa_core import BatchNormError
from swa_optax import update_bn

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # flax promotes

RNG = np.random.default_rng(0)
BATCHES = [np.float32(2 + RNG.standard_normal((n, 6))) for n in (8, 8, 4)]
POOLED = np.concatenate(BATCHES).astype(np.float64)


def batch_norm(**settings):
    return nn.BatchNorm(use_running_average=False, **settings)


def prepare(net, batch):
    variables = net.init(jax.random.key(0), batch)

    def apply(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    return Partial(apply, variables["params"]), variables["batch_stats"]


def run(net, batches=BATCHES, **options):
    apply, stats = prepare(net, batches[0])
    return update_bn(apply, stats, iter(batches), **options)


def assert_pooled(stats, x, rtol=2e-6):
    for name, expected in (("mean", x.mean(0)), ("var", x.var(0))):
        np.testing.assert_allclose(np.float64(stats[name]), expected, rtol, atol=1e-6)


class Lifted(nn.Module):
    """One batch norm, in a transformation of linen."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "cond":
            layer = batch_norm(name="norm")
            if self.is_initializing():
                return layer(x)
            return nn.cond(x[0, 0] < 1e9, lambda m, x: m(x), lambda m, x: 0 * x, layer, x)
        lift = {"remat": nn.remat, "jit": nn.jit}[self.how]
        return lift(nn.BatchNorm)(use_running_average=False, name="norm")(x)


@pytest.mark.parametrize("how", ["remat", "jit", "cond"])
def test_in_lifted_transformations(how):
    assert_pooled(run(Lifted(how))["norm"], POOLED)


class Deep(nn.Module):
    """Three layers, their parameters and statistics in one array each."""

    length: int = 3

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return batch_norm(momentum=0.9, name="norm")(nn.Dense(6, name="dense")(x)), None

        axes = {"params": 0, "batch_stats": 0}
        body = nn.scan(Body, axes, split_rngs={"params": True}, length=self.length)
        return body(name="layers")(x, None)[0]


def test_layers_in_a_scan():
    net = Deep()
    apply, stats = prepare(net, BATCHES[0])
    new = update_bn(apply, stats, BATCHES)["layers"]["norm"]
    dense = jax.tree.map(np.float64, apply.args[0]["layers"]["dense"])
    inputs = [np.float64(batch) for batch in BATCHES]
    for layer in range(net.length):
        inputs = [x @ dense["kernel"][layer] + dense["bias"][layer] for x in inputs]
        of_layer = {name: leaf[layer] for name, leaf in new.items()}
        assert_pooled(of_layer, np.concatenate(inputs), rtol=1e-5)
        inputs = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in inputs]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision_the_statistics_are_those_of_what_the_layer_saw(dtype):
    batches = [batch.astype(dtype) for batch in BATCHES]
    new = run(batch_norm(dtype=dtype), batches)
    assert new["var"].dtype == np.float32
    assert_pooled(new, np.concatenate(batches).astype(np.float64))


def test_statistics_kept_in_half_precision():
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    new = run(batch_norm(force_float32_reductions=False, **half))
    assert new["var"].dtype == jnp.bfloat16
    assert_pooled(new, POOLED, rtol=3e-2)  # the layer itself reduces in bfloat16


def test_both_ways_to_a_variance():
    for fast in (True, False):
        assert_pooled(run(batch_norm(use_fast_variance=fast)), POOLED)


@pytest.mark.parametrize("momentum", [0.0, 0.997, 0.9999])
def test_the_momentum_is_found(momentum):
    assert_pooled(run(batch_norm(momentum=momentum)), POOLED)


class Two(nn.Module):
    """A layer that never moves beside one that does."""

    @nn.compact
    def __call__(self, x):
        return batch_norm(name="moves")(batch_norm(momentum=1.0, name="stays")(x))


def test_a_momentum_of_one_is_a_frozen_layer():
    net = Two()
    apply, stats = prepare(net, BATCHES[0])
    new = update_bn(apply, stats, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, new["stays"], stats["stays"])
    eps = 1e-5
    seen = [(x - x.mean(0)) / np.sqrt(x.var(0) + eps) for x in map(np.float64, BATCHES)]
    assert_pooled(new["moves"], np.concatenate(seen), rtol=1e-5)
    with pytest.raises(BatchNormError, match="changed no running statistics") as error:
        run(batch_norm(momentum=1.0))
    assert "a momentum below 1" in str(error.value)


class Shared(nn.Module):
    """One layer for two views, or in a loop over them."""

    loop: bool

    @nn.compact
    def __call__(self, x):
        layer = batch_norm(name="norm")
        if not self.loop or self.is_initializing():
            return layer(x) + layer(2 * x)

        def body(layer, carry, view):
            return carry, layer(view)

        return nn.scan(body, variable_carry="batch_stats", variable_broadcast="params")(
            layer, 0, jnp.stack([x, 2 * x, 3 * x])
        )[1]


@pytest.mark.parametrize(("loop", "times"), [(False, 2), (True, 3)])
def test_a_layer_that_runs_twice_is_refused_with_a_way_out(loop, times):
    with pytest.raises(BatchNormError, match=f"'norm/mean' is updated {times} times") as error:
        run(Shared(loop))
    assert "batches of their own" in str(error.value)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return batch_norm(name="norm")(batch["x"], mask=batch["mask"][:, None])


def test_a_mask_with_the_number_that_it_lets_through():
    masks = [RNG.random(len(batch)) < 0.5 for batch in BATCHES]
    batches = [{"x": x, "mask": mask} for x, mask in zip(BATCHES, masks, strict=True)]
    new = run(Masked(), batches, size=lambda batch: batch["mask"].sum())
    assert_pooled(new["norm"], POOLED[np.concatenate(masks)])
    # A batch of which nothing is let through has no statistics, and no weight.
    nothing = {"x": BATCHES[0], "mask": np.zeros(len(BATCHES[0]), bool)}
    again = run(Masked(), [*batches, nothing], size=lambda batch: batch["mask"].sum())
    jax.tree.map(np.testing.assert_array_equal, again, new)


@pytest.mark.parametrize("mapped", ["vmap", "pmap"])
def test_statistics_across_a_named_axis(mapped):
    net = batch_norm(axis_name="members")
    apply, stats = prepare(net, BATCHES[0])
    members = {"vmap": 2, "pmap": 1}[mapped]

    def across(stats, batch):
        split = batch.reshape(members, -1, 6)
        mapping = getattr(jax, mapped)(lambda x: apply(stats, x), axis_name="members")
        return jax.tree.map(lambda leaf: leaf[0], mapping(split))

    assert_pooled(update_bn(across, stats, BATCHES), POOLED)


def test_a_forward_that_keeps_one_statistic_a_member_is_refused():
    apply, stats = prepare(batch_norm(), BATCHES[0])

    def stacked(stats, batch):
        return jax.vmap(lambda x: apply(stats, x))(batch.reshape(2, -1, 6))

    with pytest.raises(BatchNormError, match=r"returned 'mean' with the shape \(2, 6\)") as error:
        update_bn(stacked, stats, BATCHES)
    assert "the collection has (6,)" in str(error.value)


def test_one_compilation_for_each_shape_of_batch(caplog):
    apply, stats = prepare(Deep(), BATCHES[0])
    with jax.log_compiles(True):
        update_bn(apply, stats, [*BATCHES, *BATCHES])
    compiled = [text for text in caplog.messages if text.startswith("Finished XLA compilation")]
    forwards = [text for text in compiled if "measured" in text or "moved" in text]
    assert len(forwards) == 2  # of 8 rows, and of 4


def test_nan_in_the_first_batch():
    bad = BATCHES[0].copy()
    bad[0, 0] = np.nan
    with pytest.raises(BatchNormError, match="'mean' hold NaN"):
        run(batch_norm(), [bad, *BATCHES])


def test_inside_of_jit_it_is_refused():
    apply, stats = prepare(batch_norm(), BATCHES[0])
    for inside in (
        lambda stats, batch: update_bn(apply, stats, [batch]),
        lambda _, batch: update_bn(apply, stats, [batch]),
        lambda other, _: update_bn(lambda *given: (other, apply(*given))[1], other, [BATCHES[0]]),
    ):
        with pytest.raises(BatchNormError, match="inside of jit"):
            jax.jit(inside)(stats, BATCHES[0])


def test_a_forward_that_raises_is_heard():
    def broken(stats, batch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        update_bn(broken, {"mean": jnp.zeros(6), "var": jnp.ones(6)}, BATCHES)
    with pytest.raises(BatchNormError, match="apply returned PyTreeDef"):
        update_bn(lambda *_: None, {"mean": jnp.zeros(6), "var": jnp.ones(6)}, BATCHES)
