"""Parameters in containers of every kind: plain ones, classes of one's own, haiku's, chex's."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.core
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from adapter_optax import model_training as training

from swa_core import StructureError
from swa_optax import averaged_params, finalize, load_average, save_average, state_to_dict


class Tuple(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dataclass:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="dense", metadata={"static": True})


class Struct(flax.struct.PyTreeNode):
    kernel: Any
    bias: Any
    name: str = flax.struct.field(default="dense", pytree_node=False)


@chex.dataclass
class Chex:
    kernel: Any
    bias: Any


class WithoutKeys:
    """Registered as JAX has always let one do it: its leaves have numbers for names."""

    def __init__(self, kernel, bias):
        self.kernel, self.bias = kernel, bias


jax.tree_util.register_pytree_node(
    WithoutKeys, lambda self: ((self.kernel, self.bias), None), lambda _, both: WithoutKeys(*both)
)


def arrays():
    return jnp.full((3, 1), 0.5), jnp.zeros(1)


def attributes(params, x):
    return x @ params.kernel + params.bias


def items(params, x):
    return x @ params["kernel"] + params["bias"]


def items_twice(params, x):
    return items(params["dense"], items(params["wide"], x))


def network(x):
    return hk.Linear(1)(hk.nets.MLP([4])(x))


HAIKU = hk.without_apply_rng(hk.transform(network))

MODELS = {
    "frozen-dict": (
        lambda: flax.core.freeze(
            {
                "wide": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
                "dense": dict(zip(("kernel", "bias"), arrays(), strict=True)),
            }
        ),
        items_twice,
    ),
    "list-with-none": (
        lambda: [None, *arrays(), None],
        lambda params, x: x @ params[1] + params[2],
    ),
    "integer-keys": (
        lambda: {1: {10: arrays()}},
        lambda params, x: x @ params[1][10][0] + params[1][10][1],
    ),
    "one-array": (lambda: arrays()[0], lambda params, x: x @ params),
    "namedtuple": (lambda: Tuple(*arrays()), attributes),
    "dataclass": (lambda: Dataclass(*arrays()), attributes),
    "flax-struct": (lambda: Struct(*arrays()), attributes),
    "chex-dataclass": (lambda: Chex(kernel=arrays()[0], bias=arrays()[1]), attributes),
    "without-keys": (lambda: WithoutKeys(*arrays()), attributes),
    "haiku": (lambda: HAIKU.init(jax.random.key(0), training.data()[0]), HAIKU.apply),
}


def trained(kind):
    make, apply = MODELS[kind]

    def loss(params, x, y):
        return jnp.square(apply(params, x) - y).mean()

    return training.train(make(), loss, *training.data())


@pytest.mark.parametrize("kind", MODELS)
def test_the_average_is_read_in_the_containers_of_the_parameters(kind, tmp_path, relaxed_jax):
    state, params, visited = trained(kind)
    compiled = [jax.jit(averaged_params)] if kind in ("list-with-none", "without-keys") else []
    for read in (averaged_params, finalize, *compiled):
        training.assert_is_mean(read(state, params), params, visited)
    # A file names each leaf apart, and another training of the same model reads it.
    save_average(tmp_path / "average.safetensors", state, training.CONFIG)
    again = load_average(tmp_path / "average.safetensors", state)
    training.assert_is_mean(finalize(again, params), params, visited)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("namedtuple", {"kernel", "bias"}),
        ("dataclass", {"kernel", "bias"}),
        ("flax-struct", {"kernel", "bias"}),
        ("chex-dataclass", {"kernel", "bias"}),
        ("without-keys", {"0", "1"}),
        ("list-with-none", {"1", "2"}),
        ("one-array", {""}),
        ("haiku", {"linear/w", "linear/b", "mlp/~/linear_0/w", "mlp/~/linear_0/b"}),
    ],
)
def test_leaves_have_the_names_that_their_users_know(kind, names, relaxed_jax):
    make, _ = MODELS[kind]
    state = training.swa(training.CONFIG).init(make())
    assert set(state_to_dict(state)["average"]) == names


def test_a_container_that_gives_two_children_one_key_is_refused():
    class Twins:
        def __init__(self, both):
            self.both = both

    key = jax.tree_util.GetAttrKey("twin")
    jax.tree_util.register_pytree_with_keys(
        Twins, lambda self: ([(key, leaf) for leaf in self.both], None), lambda _, both: Twins(both)
    )
    tx = training.swa(training.CONFIG)
    params = Twins([jnp.zeros(1), jnp.ones(1)])
    with pytest.raises(StructureError, match="two leaves have the path 'twin'") as error:
        tx.update(params, tx.init(params), params)
    assert "a key of its own" in str(error.value)
