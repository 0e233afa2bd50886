"""A small training of parameters that are sharded in many ways, and the average it leads to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import swa_core
from swa_core import EMA, SWAConfig, SWAState
from swa_optax import swa

P = PartitionSpec
CONFIG = SWAConfig(start="2step", every="2step", rule=EMA(0.75))
UPDATES = 6  # snapshots 2, 4, 6
SHAPES = {
    "line": ((8,), ("data",)),
    "grid": ((4, 2), ("data", "model")),
    "one": ((1,), ("data",)),
    # Two processes with two devices each: in the first, the rows lie in both; in the second, the
    # columns do.
    "pairs": ((4,), ("data",)),
    "across": ((2, 2), ("data", "model")),
}
SPECS = {
    "both": P("data", "model"),
    "turned": P("model", "data"),
    "together": P(("data", "model")),
    "rows": P("data"),  # shorter than the rank
    "columns": P(None, "model"),
    "half": P("data"),
    "replicated": P(),
    "scalar": P(),
}


@cache
def mesh_of(kind: str, mode: str = "Auto") -> Mesh:
    shape, names = SHAPES[kind]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    if kind == "across":
        devices = devices.T
    return Mesh(devices, names, axis_types=(getattr(AxisType, mode),) * len(names))


def values(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        "both": (8, 6),
        "turned": (2, 8),
        "together": (16,),
        "rows": (8, 3, 2),
        "columns": (3, 4),
        "half": (8, 2),
        "replicated": (5,),
        "scalar": (),
    }
    drawn = {name: rng.normal(1, 1, shape).astype("f4") for name, shape in shapes.items()}
    return drawn | {"half": drawn["half"].astype(jnp.bfloat16)}


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """As in ``SPECS``, as far as the mesh has the axes."""

    def known(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        left = tuple(name for name in names if name in mesh.axis_names)
        return left if len(left) > 1 else left[0] if left else None

    return {name: NamedSharding(mesh, P(*map(known, spec))) for name, spec in SPECS.items()}


def placed(mesh: Mesh, tree: dict[str, Any] | None = None) -> dict[str, jax.Array]:
    """The parameters on the devices of a mesh."""
    tree = values() if tree is None else tree
    where = shardings(mesh)
    return {
        name: jax.make_array_from_callback(
            np.shape(leaf), where[name], np.asarray(leaf).__getitem__
        )
        for name, leaf in tree.items()
    }


def optimizer(config: SWAConfig = CONFIG, **arguments: Any) -> Any:
    return optax.chain(optax.sgd(0.25), swa(config, **arguments))


def stepper(tx: Any, **jit: Any) -> Callable[..., Any]:
    """A step whose parameters, on any number of devices, are the same to the bit."""

    def step(params: Any, state: Any, x: Any) -> Any:
        grads = jax.tree.map(lambda leaf: leaf * x.astype(leaf.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit)


def inputs(updates: int = UPDATES) -> Any:
    return np.random.default_rng(1).normal(size=updates).astype("f4")


def whole(leaf: Any) -> Any:
    """An array in this process's memory, gathered if several have a part of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def host(tree: Any) -> Any:
    return jax.tree.map(whole, tree)


def cores(recorded: list[Any]) -> SWAState:
    """The average of the parameters after each update, as the core has it."""
    state = swa_core.init(recorded[0])
    for params in recorded:
        state = swa_core.update(state, params, CONFIG.schedule(), CONFIG.rule)
    return state


def is_the_cores(state: SWAState, recorded: list[Any]) -> None:
    expected = cores(recorded)
    assert int(state.n_averaged) == expected.n_averaged > 0
    for name, leaf in expected.average.items():
        np.testing.assert_allclose(
            whole(state.average[name]), leaf, rtol=2e-6, atol=1e-7, err_msg=name
        )


def lies_as(tree: Any, like: Any) -> None:
    """Every array of a tree is sharded as that of the same name in the other."""
    for name, leaf in like.items():
        found, wanted = tree[name].sharding, getattr(leaf, "sharding", leaf)
        # P("data") and P("data", None) are the same, and which of them it is, JAX chooses.
        assert isinstance(found, NamedSharding), (name, found)
        assert found.mesh == wanted.mesh, (name, found)
        assert found.is_equivalent_to(wanted, tree[name].ndim), (name, found, wanted)
        assert found.memory_kind == wanted.memory_kind, (name, found)


def same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = whole(got), whole(wanted)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert got.tobytes() == wanted.tobytes()


def with_nan(leaf: jax.Array, device: Any) -> np.ndarray[Any, Any]:
    """A leaf with a NaN in the last place of what one device has of it."""
    array = whole(leaf).copy()
    place = leaf.sharding.devices_indices_map(leaf.shape)[device]
    part = array[place]
    array[place] = np.where(np.arange(part.size).reshape(part.shape) == part.size - 1, np.nan, part)
    return array
