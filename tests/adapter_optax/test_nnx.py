"""Models of flax nnx: the average in an ``nnx.Optimizer``, or beside a state that was split off."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.model_training import CONFIG, SNAPSHOTS, UPDATES, data
from flax import nnx
from flax.traverse_util import flatten_dict

from swa_core import NothingAveragedError, StateError, StructureError, SWAWarning
from swa_optax import (
    accumulate,
    averaged_params,
    finalize,
    init,
    load_average,
    n_averaged,
    n_skipped,
    save_average,
    state_from_dict,
    state_to_dict,
    swa,
    wrap,
)

pytestmark = pytest.mark.usefixtures("relaxed_jax")  # flax promotes

X, Y = data()
TX = optax.chain(optax.sgd(0.1, momentum=0.9), swa(CONFIG))  # one, so that jit knows it again


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


class Net(nnx.Module):
    """Statistics, random numbers, a list, a layer under two names, a counter, a frozen scale."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.first = self.blocks[0].linear
        self.head = nnx.Linear(3, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        for block in self.blocks:
            x = block(x)
        return self.head(self.first(x))


def loss(model):
    return jnp.square(model(X) - Y).mean()


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


def make():
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def weights(model):
    return flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def flat(params):
    return {path: np.array(leaf) for path, leaf in flatten_dict(params).items()}


def trained():
    model, optimizer = make()
    visited = []
    for _ in range(UPDATES):
        step(model, optimizer)
        visited.append(weights(model))
    return model, optimizer, mean_of(visited)


def mean_of(visited, snapshots=SNAPSHOTS):
    return {
        path: np.mean([np.float64(visited[update - 1][path]) for update in snapshots], axis=0)
        for path in visited[0]
    }


def assert_holds(found, mean):
    assert found.keys() == mean.keys()
    for path, expected in mean.items():
        np.testing.assert_allclose(found[path], expected, rtol=2e-6, atol=1e-7, err_msg=str(path))


def everything(model):
    bare = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {
        path: np.array(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in bare.items()
    }


def assert_same(found, expected, but=()):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        if path not in but:
            np.testing.assert_array_equal(found[path], leaf, err_msg=str(path))


def test_the_average_is_read_as_a_state_or_as_a_model():
    model, optimizer, mean = trained()
    before = everything(model)
    params = nnx.state(model, nnx.Param)
    for read in (averaged_params, finalize):
        for opt_state in (optimizer, optimizer.opt_state):
            averaged = read(opt_state, params)
            assert type(averaged) is nnx.State
            clone = nnx.clone(model)
            nnx.update(clone, averaged)
            assert_holds(weights(clone), mean)
            # All that is no parameter comes as it is in the model.
            new = read(opt_state, model)
            assert type(new) is Net
            assert new.first is new.blocks[0].linear
            assert_holds(weights(new), mean)
            assert_same(everything(new), before, but=weights(new))
    # The two share no variable: an evaluation that trains, or new statistics, stay where they are.
    new(X)
    assert_same(everything(model), before)
    assert (n_averaged(optimizer), n_skipped(optimizer.opt_state)) == (len(SNAPSHOTS), 0)
    assert type(n_averaged(optimizer)) is int


def test_the_variables_keep_their_types_and_metadata():
    model, optimizer, _ = trained()
    model.head.kernel.set_metadata(note="mine")
    for kernel in (
        averaged_params(optimizer, nnx.state(model))["head"]["kernel"],
        averaged_params(optimizer, model).head.kernel,
    ):
        assert type(kernel) is nnx.Param
        assert kernel.get_metadata()["note"] == "mine"


def test_reading_inside_of_jit():
    model, optimizer, mean = trained()

    @nnx.jit
    def evaluate(model, optimizer):
        return averaged_params(optimizer, model), averaged_params(
            optimizer.opt_state, nnx.state(model, nnx.Param)
        )

    as_model, state = evaluate(model, optimizer)
    assert_holds(weights(as_model), mean)
    nnx.update(model, state)
    assert_holds(weights(model), mean)

    with pytest.raises(StateError, match="inside of jit"):
        nnx.jit(lambda model, optimizer: finalize(optimizer, model))(model, optimizer)


def test_before_the_first_snapshot_the_live_weights_as_a_model_of_their_own():
    model, optimizer = make()
    step(model, optimizer)
    with pytest.warns(SWAWarning, match=r"nothing is averaged yet \(after 1 updates\)") as caught:
        new = averaged_params(optimizer, model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new is not model
        assert_same(everything(new), everything(model))
        inside = nnx.jit(averaged_params)(optimizer, model)
        before = everything(model)
        assert_same(everything(inside), before)
    new(X)
    assert_same(everything(model), before)
    with pytest.raises(NothingAveragedError, match="nothing is averaged after 1 updates"):
        finalize(optimizer, model)


def test_training_is_the_one_without_averaging():
    averaging, _, _ = trained()
    plain = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(plain, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    for _ in range(UPDATES):
        step(plain, optimizer)
    assert_same(everything(plain), everything(averaging))


def test_only_what_the_optimizer_trains_is_averaged():
    model = Net(nnx.Rngs(0))
    heads = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), swa(CONFIG)), wrt=heads)
    start = weights(model)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, heads))(model))

    for _ in range(UPDATES):
        step(model, optimizer)
    new = weights(averaged_params(optimizer, model))
    for path, leaf in new.items():
        changed = not np.array_equal(leaf, start[path])
        assert changed == (path[0] == "head"), path


class Small(nnx.Module):
    """Random numbers and a list, and little to compile."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 1, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("pure", [False, True], ids=["state", "dict"])
def test_a_loop_over_split_states(pure):
    model = Small()
    structure, params, others = nnx.split(model, nnx.Param, ...)
    if pure:
        params = nnx.to_pure_dict(params)
    opt_state, visited = TX.init(params), []

    @jax.jit
    def step(params, others, opt_state):
        def loss_of(params):
            state = nnx.state(model, nnx.Param) if pure else params
            if pure:
                nnx.replace_by_pure_dict(state, params)
            net = nnx.merge(structure, state, others, copy=True)
            return loss(net), nnx.state(net, nnx.Not(nnx.Param))

        grads, others = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), others, opt_state

    for _ in range(UPDATES):
        params, others, opt_state = step(params, others, opt_state)
        visited.append(flat(params if pure else nnx.to_pure_dict(params)))
    averaged = averaged_params(opt_state, params)
    assert type(averaged) is type(params)
    assert_holds(flat(averaged if pure else nnx.to_pure_dict(averaged)), mean_of(visited))
    # And into the model itself, whatever form the average was made of.
    assert_holds(weights(finalize(opt_state, model)), mean_of(visited))


def test_paths_are_those_of_the_model():
    model, optimizer, mean = trained()
    names = {"/".join(map(str, path)) for path in mean}
    assert "blocks/0/linear/kernel" in names
    assert set(state_to_dict(optimizer)["average"]) == names

    model.head.kernel = nnx.Param(jnp.zeros((5, 1)))
    for params in (model, nnx.state(model)):
        with pytest.raises(StructureError, match=r"leaf 'head/kernel' has shape \(5, 1\)"):
            averaged_params(optimizer, params)
    with pytest.raises(StructureError, match="no floating-point leaf 'blocks/0/linear/bias'"):
        averaged_params(optimizer, nnx.state(model, nnx.BatchStat))

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(StructureError, match="leaf 'head/kernel' has shape"):
        swa(CONFIG).update(params, optimizer.opt_state[-1], params)


def test_a_state_without_its_structure_is_refused_with_the_way_back():
    model, optimizer, mean = trained()
    structure, state = nnx.split(optimizer)
    with pytest.raises(StateError, match="holds no average") as error:
        averaged_params(state, model)
    assert "nnx.merge" in str(error.value)
    assert_holds(weights(averaged_params(nnx.merge(structure, state), model)), mean)


@pytest.mark.parametrize("form", ["dict", "file"])
def test_a_training_goes_on_from_a_saved_average(form, tmp_path):
    model, optimizer, _ = trained()
    path = tmp_path / "average.safetensors"
    save_average(path, optimizer.opt_state, CONFIG)
    saved = state_to_dict(optimizer.opt_state)
    resumed = nnx.Optimizer(model, optimizer.tx, wrt=nnx.Param)
    if form == "dict":
        resumed.opt_state = state_from_dict(saved, resumed.opt_state)
    else:
        resumed.opt_state = load_average(path, resumed.opt_state)
    assert jax.tree.structure(resumed.opt_state) == jax.tree.structure(optimizer.opt_state)
    # The optimizer's own moments are in nobody's average.
    nnx.update(resumed.opt_state[0], nnx.state(optimizer.opt_state[0]))
    other = nnx.clone(model)
    for _ in range(3):
        step(model, optimizer)
        step(other, resumed)
    assert_same(everything(averaged_params(resumed, other)), everything(finalize(optimizer, model)))


def test_updates_that_are_made_of_several_batches():
    tx = wrap(optax.MultiSteps(optax.sgd(0.1), 2), {"start": "1step", "every": "1step"})
    model = Small()
    optimizer, visited = nnx.Optimizer(model, tx, wrt=nnx.Param), []
    for _ in range(4):
        step(model, optimizer)
        visited.append(weights(model))
    assert n_averaged(optimizer) == 2
    assert_holds(weights(averaged_params(optimizer, model)), mean_of(visited, (2, 4)))


def test_averaging_in_a_loop_of_ones_own():
    model, visited = Small(), []
    state = init(nnx.state(model, nnx.Param))
    for _ in range(3):
        nnx.update(model, jax.tree.map(lambda leaf: 1.5 * leaf, nnx.state(model, nnx.Param)))
        visited.append(weights(model))
        state = accumulate(state, nnx.state(model, nnx.Param))
    assert_holds(weights(finalize(state, model)), mean_of(visited, (1, 2, 3)))
    # The statistics of a model, say, must not be averaged with it.
    with pytest.raises(StructureError, match="cannot average a whole model of nnx") as error:
        init(model)
    assert "nnx.state(model, nnx.Param)" in str(error.value)
