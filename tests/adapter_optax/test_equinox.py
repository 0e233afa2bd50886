"""Models of Equinox: functions among their leaves, and batch norm in a state of its own."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax import model_training as training

from swa_core import BatchNormError, SWAWarning
from swa_optax import averaged_params, finalize, state_to_dict, swa, update_bn

pytestmark = pytest.mark.usefixtures("relaxed_jax")

X, Y = training.data()


class Net(eqx.Module):
    layers: list
    activation: Callable
    scale: float = eqx.field(static=True)
    steps: jax.Array

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 2)
        self.layers = [eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1])]
        self.activation = jax.nn.tanh
        self.scale = 2.0
        self.steps = jnp.array(7)

    def __call__(self, x):
        return self.scale * self.layers[1](self.activation(self.layers[0](x)))


def loss(model):
    return jnp.square(jax.vmap(model)(X) - Y).mean()


def trained(tx, trainable=eqx.is_inexact_array):
    """As Equinox's users train: everything by its filters, updates with None for the rest."""
    model = Net()
    opt_state = tx.init(eqx.filter(model, trainable))

    @eqx.filter_jit
    def step(model, opt_state):
        changing, rest = eqx.partition(model, trainable)
        grads = eqx.filter_grad(lambda part: loss(eqx.combine(part, rest)))(changing)
        updates, opt_state = tx.update(grads, opt_state, changing)
        return eqx.apply_updates(model, updates), opt_state

    visited = []
    for _ in range(training.UPDATES):
        model, opt_state = step(model, opt_state)
        visited.append(training.copied(eqx.filter(model, trainable)))
    return model, opt_state, visited


TX = optax.chain(optax.sgd(0.1, momentum=0.9), swa(training.CONFIG))


def test_parameters_by_a_filter_or_the_whole_model():
    model, opt_state, visited = trained(TX)
    params = eqx.filter(model, eqx.is_inexact_array)
    for read in (averaged_params, finalize, eqx.filter_jit(averaged_params)):
        averaged = read(opt_state, params)
        training.assert_is_mean(averaged, params, visited)
        # A whole model, functions and all, comes back whole: no combine is needed.
        whole = read(opt_state, model)
        assert eqx.tree_equal(whole, eqx.combine(averaged, model))
        assert whole.activation is model.activation
        assert whole(X[0]).shape == (1,)
    names = {f"layers/{place}/{name}" for place in (0, 1) for name in ("weight", "bias")}
    assert set(state_to_dict(opt_state)["average"]) == names


def test_a_layer_that_is_frozen_by_a_filter():
    everything = jax.tree.map(eqx.is_inexact_array, Net())
    frozen = eqx.tree_at(lambda model: model.layers[0].weight, everything, False)
    model, opt_state, visited = trained(TX, frozen)
    averaged = averaged_params(opt_state, model)
    assert averaged.layers[0].weight is model.layers[0].weight
    training.assert_is_mean(eqx.filter(averaged, frozen), eqx.filter(model, frozen), visited)


class Normal(eqx.Module):
    """Two batch norms, and a layer whose state is a pair of another kind."""

    first: eqx.nn.Linear
    norms: list
    spectral: eqx.nn.SpectralNorm

    def __init__(self, mode="batch", layers=2):
        keys = jax.random.split(jax.random.key(0), 3)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norms = [
            eqx.nn.BatchNorm(4, "batch", momentum=momentum, mode=mode)
            for momentum in (0.9, 0.99)[:layers]
        ]
        self.spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(4, 4, key=keys[1]), "weight", key=keys[2])

    def __call__(self, x, state):
        x = self.first(x)
        for norm in self.norms:
            x, state = norm(jax.nn.relu(x), state)
        return self.spectral(x, state)


BATCHES = [np.float32(np.random.default_rng(n).standard_normal((n, 3))) for n in (8, 8, 5)]


def make(**options):
    model, state = eqx.nn.make_with_state(Normal)(**options)

    def apply(state, batch):
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(batch, state)[1]

    return model, state, apply


def used(norm, state):
    """Mean and variance that a layer normalises by in evaluation, from what it does to 0 and 1."""
    evaluating = eqx.nn.inference_mode(norm)
    zero, one = (
        np.float64(evaluating(jnp.full(4, value), copied(state))[0]) for value in (0.0, 1.0)
    )
    deviation = 1 / (one - zero)
    return -zero * deviation, deviation**2 - norm.eps


def copied(state):
    return jax.tree.map(lambda leaf: leaf, state)


def seen(model, batch):
    """What the two batch norms see, float64."""
    first = np.maximum(np.float64(jax.vmap(model.first)(batch)), 0)
    normal = (first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5)
    return first, np.maximum(normal, 0)


@pytest.mark.parametrize("updates", [0, 2])
def test_pooled_statistics_in_a_state(updates):
    model, state, apply = make()
    for batch in BATCHES[:updates]:
        state = eqx.filter_jit(apply)(state, batch)
    before = jax.tree.leaves(copied(state))
    new = update_bn(apply, state, BATCHES)
    assert type(new) is type(state)
    inputs = [
        np.concatenate(parts) for parts in zip(*(seen(model, b) for b in BATCHES), strict=True)
    ]
    for norm, x in zip(model.norms, inputs, strict=True):
        mean, var = used(norm, new)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(var, x.var(0), rtol=1e-4, atol=1e-5)
    # Counters and the state of the other layer are those of before, and so is the state itself.
    same = [np.array_equal(*both) for both in zip(before, jax.tree.leaves(new), strict=True)]
    assert same == [True, False, False, True, False, False, True, True]
    for old, leaf in zip(before, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_layers_that_normalise_by_their_running_statistics():
    _, state, apply = make(mode="ema")
    state = eqx.filter_jit(apply)(state, BATCHES[0])
    with pytest.raises(BatchNormError, match="is no running average") as error:
        update_bn(apply, state, BATCHES)
    assert 'mode="ema"' in str(error.value)
    # A single one disturbs nobody.
    model, state, apply = make(mode="ema", layers=1)
    state = update_bn(apply, eqx.filter_jit(apply)(state, BATCHES[0]), BATCHES)
    x = np.concatenate([seen(model, batch)[0] for batch in BATCHES])
    mean, var = used(model.norms[0], state)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, x.var(0), rtol=1e-4, atol=1e-5)


def test_a_state_without_batch_norm_is_no_work():
    _, state, apply = make(layers=0)
    with pytest.warns(SWAWarning, match="nothing to do"):
        assert update_bn(apply, state, BATCHES) is state
