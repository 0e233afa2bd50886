"""What a reviewer found who had not seen the project before."""

from __future__ import annotations

import gc
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.training import EVERY
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from swa_core import BatchNormError, StateError, StructureError, SWAConfig
from swa_optax import (
    accumulate,
    averaged_params,
    init,
    load_average,
    n_averaged,
    save_average,
    state_from_dict,
    state_to_dict,
    swa,
    update_bn,
    wrap,
)

pytestmark = pytest.mark.usefixtures("relaxed_jax")


@jax.tree_util.register_pytree_node_class
class Training:
    """A state of a training whose children are no items and have other names inside."""

    def __init__(self, params, opt_state):
        self._params, self._opt_state = params, opt_state

    def tree_flatten(self):
        return (self._params, self._opt_state), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def trained(tx, updates, params=None):
    params = {"w": jnp.zeros(2)} if params is None else params
    state = tx.init(params)
    for _ in range(updates):
        changes, state = tx.update(
            jax.tree.map(lambda leaf: -jnp.ones_like(leaf), params), state, params
        )
        params = optax.apply_updates(params, changes)
    return params, state


def test_in_a_container_of_ones_own_the_average_is_found_and_a_wrong_order_as_well():
    params, state = trained(optax.chain(optax.sgd(1.0), swa(EVERY)), 3)
    training = Training(params, state)
    assert n_averaged(training) == 3
    assert averaged_params(training, params)["w"].tolist() == [2, 2]
    params, state = trained(optax.chain(swa(EVERY), optax.sgd(1.0)), 3)
    with pytest.raises(StateError, match="swa is not last in its chain"):
        averaged_params(Training(params, state), params)


def test_micro_steps_inside_of_split_real_and_imaginary_do_not_count():
    steps = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    params, state = trained(wrap(optax.contrib.split_real_and_imaginary(steps), EVERY), 6)
    assert n_averaged(state) == 3
    assert averaged_params(state, params)["w"].tolist() == [2, 2]


def test_trainings_apart_in_shard_map_with_apply_if_finite():
    tx = wrap(optax.apply_if_finite(optax.sgd(1.0), 3), EVERY)
    mesh = jax.sharding.Mesh(jax.devices(), "x")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def train(w):
        params = {"w": w[0]}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update({"w": -params["w"]}, state, params)
            params = optax.apply_updates(params, updates)
        return averaged_params(state, params)["w"][None], state[1].n_averaged[None]

    start = 1.0 + jnp.arange(len(jax.devices()))
    start = start.at[0].set(jnp.nan)
    mean, number = train(start)
    np.testing.assert_array_equal(number[1:], 3)
    np.testing.assert_allclose(mean[1:], start[1:] * (2 + 4 + 8) / 3)
    assert number[0] == 0


@pytest.mark.parametrize("averaged", [False, True])
def test_what_is_loaded_lies_on_the_device_of_what_it_replaces(averaged):
    device = jax.devices()[-1]
    params = jax.device_put({"w": jnp.ones(2)}, device)
    state = init(params)
    if averaged:
        state = accumulate(state, params)
    average = state_from_dict(state_to_dict(state), init(params)).average["w"]
    assert (average.devices(), average.committed) == ({device}, True)
    plain = init({"w": jnp.ones(2)})
    assert not state_from_dict(state_to_dict(plain), plain).average["w"].committed


STATS = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
BATCHES = [np.float32(np.random.default_rng(n).normal(n, 1 + n, (8, 2))) for n in range(3)]


def moved(stats, x):
    return {
        "mean": 0.9 * stats["mean"] + 0.1 * x.mean(0),
        "var": 0.9 * stats["var"] + 0.1 * x.var(0),
    }


def divided(stats, x):
    seen = {"mean": x.mean(0), "var": x.var(0)}
    return jax.tree.map(lambda old, new: old + (new - old) / 10, stats, seen)


def twice(layer):
    return lambda stats, x: layer(layer(stats, x), 2 * x)


def in_a_loop(stats, x):
    views = jnp.minimum(jnp.int32(2), x.shape[0])
    return lax.fori_loop(0, views, lambda view, stats: moved(stats, x * (1.0 + view)), stats)


@pytest.mark.parametrize(
    ("apply", "often"),
    [
        (twice(moved), "2 times"),
        (twice(divided), "2 times"),
        (in_a_loop, "in a loop of any length"),
    ],
)
def test_a_layer_that_runs_twice_in_any_form_is_refused(apply, often):
    with pytest.raises(BatchNormError, match=f"'mean' is updated {often} in one forward"):
        update_bn(apply, STATS, BATCHES)


def test_a_difference_that_is_divided_is_a_running_average():
    new = update_bn(divided, STATS, BATCHES)
    x = np.float64(np.concatenate(BATCHES))
    np.testing.assert_allclose(new["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], x.var(0), rtol=1e-5)


@pytest.mark.parametrize("runs", [(False, True, True), (True, True, False)])
def test_a_layer_that_runs_with_some_batches_only_is_refused(runs):
    def apply(stats, batch):
        x = batch["x"]
        other = lax.cond(batch["runs"], lambda old: moved(old, x), lambda old: old, stats["other"])
        return {"always": moved(stats["always"], x), "other": other}

    stats = {"always": STATS, "other": STATS}
    batches = [{"x": x, "runs": np.bool_(run)} for x, run in zip(BATCHES, runs, strict=True)]
    with pytest.raises(BatchNormError, match="'other/mean' moves with some batches"):
        update_bn(apply, stats, batches)
    new = update_bn(apply, stats, [batch | {"runs": np.bool_(False)} for batch in batches])
    np.testing.assert_array_equal(new["other"]["mean"], STATS["mean"])
    assert new["always"]["mean"].all()


def in_nnx(weights):
    from flax import nnx

    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    update_bn(lambda model, x: model(x @ weights[:2, :2]), model, BATCHES)


@pytest.mark.parametrize(
    "update",
    [
        lambda weights: update_bn(lambda s, x: moved(s, x @ weights[:2, :2]), STATS, BATCHES),
        lambda weights: update_bn(Partial(moved_by, weights), STATS, BATCHES),
        in_nnx,
    ],
)
def test_parameters_are_let_go_after_update_bn(update):
    shape = (97, 89)
    update(jnp.ones(shape))
    gc.collect()
    assert not [array for array in jax.live_arrays() if array.shape == shape]


def moved_by(weights, stats, x):
    return moved(stats, x @ weights[:2, :2])


def test_stacked_layers_of_equinox():
    eqx = pytest.importorskip("equinox")

    class Stacked(eqx.Module):
        layers: eqx.nn.BatchNorm
        last: eqx.nn.BatchNorm

        def __init__(self):
            self.layers = eqx.filter_vmap(make_layer)(jnp.arange(2))
            self.last = make_layer(0)

        def __call__(self, x, state):
            arrays, rest = eqx.partition(self.layers, eqx.is_array)

            def body(x, layer):
                arrays, state = layer
                return eqx.combine(arrays, rest)(2 * x + 1, state)

            x, inner = lax.scan(body, x, (arrays, state.substate(self.layers)))
            return self.last(x, state.update(inner))

    def make_layer(_):
        return eqx.nn.BatchNorm(2, "batch", mode="batch", momentum=0.9)

    model, state = eqx.nn.make_with_state(Stacked)()

    def apply(state, x):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)[
            1
        ]

    for updates in range(3):
        count, means, variances = jax.tree.leaves(update_bn(apply, state, BATCHES))[:3]
        assert count.tolist() == [updates] * 2
        seen = [2 * np.float64(x) + 1 for x in BATCHES]
        for mean, var in zip(means, variances, strict=True):
            kept = 1 - 0.9**updates if updates else 1.0  # divided by it where it is used
            pooled = np.concatenate(seen)
            np.testing.assert_allclose(mean, kept * pooled.mean(0), rtol=1e-4)
            np.testing.assert_allclose(var, kept * pooled.var(0), rtol=1e-4)
            seen = [2 * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 1 for x in seen]
        state = apply(state, BATCHES[0])


def test_an_average_file_takes_the_configuration_in_any_form(tmp_path):
    file, config = tmp_path / "average.safetensors", {"rule": {"name": "ema", "decay": 0.5}}
    params = {"w": jnp.ones(2)}
    save_average(file, accumulate(init(params), params, rule=config["rule"]), config)
    assert n_averaged(load_average(file, init(params), config=config)) == 1
    (tmp_path / "swa.toml").write_text('[swa]\nrule = "uniform"\n')
    with pytest.raises(StateError, match="rule"):
        load_average(file, init(params), config=tmp_path / "swa.toml")


def test_a_complex_average_is_not_read_into_real_parameters():
    params = {"w": jnp.full(2, 1j, jnp.complex64)}
    state = accumulate(init(params), params)
    with pytest.raises(StructureError, match="'w' is float32, but the running average holds compl"):
        averaged_params(state, {"w": jnp.zeros(2)})
    assert averaged_params(state, params)["w"].tolist() == [1j, 1j]


def test_a_configuration_in_the_place_of_its_rule_is_refused():
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"rule must be a Rule.* got SWAConfig; .* its \.rule"):
        accumulate(init(params), params, rule=SWAConfig())


def test_an_older_flax_beside_parameters_without_it(monkeypatch):
    class Older:
        def __init__(self, value):
            self.value = value

    older = types.ModuleType("flax.nnx")
    older.Variable = older.Object = Older
    monkeypatch.setitem(sys.modules, "flax.nnx", older)
    params = {"w": jnp.ones(2)}
    state = accumulate(init(params), params)
    assert n_averaged(state._replace(n_averaged=Older(state.n_averaged))) == 1
    assert averaged_params(state, params)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_temporaries_of_half_precision_parameters_either(dtype):
    size = 1 << 16
    params = {"a": jnp.ones(size, dtype), "b": jnp.ones(size, dtype)}
    joined = jax.jit(accumulate, donate_argnums=0).lower(init(params), params).compile()
    assert joined.memory_analysis().temp_size_in_bytes < 4096
