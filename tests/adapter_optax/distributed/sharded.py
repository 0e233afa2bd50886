"""Where the average lies, and what the devices say to each other while it is made."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapter_optax.distributed.hlo import Collective, collectives
from adapter_optax.distributed.training import (
    CONFIG,
    P,
    host,
    inputs,
    is_the_cores,
    lies_as,
    mesh_of,
    optimizer,
    placed,
    same_bits,
    shardings,
    stepper,
    values,
    with_nan,
)
from jax.sharding import NamedSharding

from swa_core import SWAConfig
from swa_optax import averaged_params, finalize, n_averaged, n_skipped, swa

KEEP, SKIP = replace(CONFIG, nonfinite="keep"), CONFIG
EVERY = SWAConfig(start="1step", every="1step")


def check_the_average_is_made_where_the_parameters_lie(kind: str, mode: str) -> None:
    params, tx = placed(mesh_of(kind, mode)), optimizer()
    for init in (tx.init, jax.jit(tx.init), jax.jit(tx.init, donate_argnums=0, keep_unused=True)):
        lies_as(init(params)[1].average, shardings(mesh_of(kind, mode)))
        params = placed(mesh_of(kind, mode))


def check_it_stays_there_through_donated_updates(kind: str, mode: str) -> None:
    tx, params = optimizer(), placed(mesh_of(kind, mode))
    step, state = stepper(tx, donate_argnums=(0, 1)), jax.jit(tx.init)(params)
    recorded = []
    for x in inputs():
        params, state = step(params, state, x)
        recorded.append(host(params))
        lies_as(params, shardings(mesh_of(kind, mode)))
        lies_as(state[1].average, params)
    is_the_cores(state[1], recorded)
    assert step._cache_size() == compilations_without_averaging(kind, mode)
    for read in (averaged_params, jax.jit(averaged_params), finalize):
        found = read(state, params)
        lies_as(found, params)
        average = host(state[1].average)
        same_bits(host(found), average | {"half": average["half"].astype(jnp.bfloat16)})
    assert n_averaged(state) == 3


def compilations_without_averaging(kind: str, mode: str) -> int:
    """Where JAX writes P("data", None) as P("data") in what a step returns, there are two."""
    params, tx = placed(mesh_of(kind, mode)), optax.sgd(0.25)
    step, state = stepper(tx), jax.jit(tx.init)(params)
    for x in inputs():
        params, state = step(params, state, x)
    return step._cache_size()


def check_the_same_bits_as_on_one_device(kind: str, mode: str) -> None:
    ends = []
    for mesh in (mesh_of(kind, mode), mesh_of("one", mode)):
        with jax.set_mesh(mesh):
            tx, params = optimizer(), placed(mesh)
            step, state = stepper(tx), jax.jit(tx.init)(params)
            for x in inputs():
                params, state = step(params, state, x)
            ends.append(host((params, state)))
    same_bits(*ends)


def check_eager_updates_too(kind: str, mode: str) -> None:
    tx, params = swa(EVERY), placed(mesh_of(kind, mode))
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zero, tx.init(params), params)
    lies_as(state.average, params)
    bad = placed(
        mesh_of(kind, mode), values() | {"both": with_nan(params["both"], jax.devices()[5])}
    )
    _, state = tx.update(zero, state, bad)
    assert (n_averaged(state), n_skipped(state)) == (1, 1)


def check_explicit_shardings_of_jit(kind: str, mode: str) -> None:
    mesh = mesh_of(kind, mode)
    tx, params = optimizer(), placed(mesh)
    of_state = jax.jit(tx.init).lower(params).compile().output_shardings
    both = (shardings(mesh), of_state)
    number = NamedSharding(mesh, P())
    step = stepper(tx, in_shardings=(*both, number), out_shardings=both, donate_argnums=(0, 1))
    init = jax.jit(tx.init, in_shardings=(shardings(mesh),), out_shardings=of_state)
    state = init(params)
    for x in inputs():
        params, state = step(params, state, x)
    lies_as(state[1].average, shardings(mesh))
    assert n_averaged(state) == 3


def check_an_abstract_init_says_where_it_will_lie(kind: str, mode: str) -> None:
    mesh, tx = mesh_of(kind, mode), optimizer()
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        values(),
        shardings(mesh),
    )
    shapes = jax.eval_shape(tx.init, abstract)
    real = tx.init(placed(mesh))
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    where = jax.jit(tx.init).lower(abstract).compile().output_shardings
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        where,
    )
    lies_as(state[1].average, shardings(mesh))
    lies_as(tx.init(abstract)[1].average, shardings(mesh))
    # Whole, a train step compiles before there is any array.
    x = jax.ShapeDtypeStruct((), jnp.float32)
    step = stepper(tx).lower(abstract, state, x).compile()
    for name, found in step.output_shardings[1][1].average.items():
        assert found.is_equivalent_to(shardings(mesh)[name], abstract[name].ndim), name


def compiled(config: SWAConfig, params: Any) -> list[Collective]:
    tx = optax.chain(optax.sgd(0.25, momentum=0.5), swa(config))
    state = jax.jit(tx.init)(params)
    step = stepper(tx, donate_argnums=(0, 1))
    return collectives(step.lower(params, state, np.float32(1)).compile().as_text())


def check_nothing_is_said_where_nonfinite_is_kept(kind: str, mode: str) -> None:
    assert compiled(KEEP, placed(mesh_of(kind, mode))) == []


def check_one_number_goes_round_where_nonfinite_is_skipped(kind: str, mode: str) -> None:
    mesh = mesh_of(kind, mode)
    one = [Collective("all-reduce", "s32[]", conditional=True)]
    assert compiled(SKIP, placed(mesh)) == one
    assert compiled(SKIP, {"both": placed(mesh)["both"]}) == one
    # Of what every device has whole, each knows by itself.
    names = ("replicated", "scalar")
    assert compiled(SKIP, {name: placed(mesh)[name] for name in names}) == []


def check_a_nan_on_any_device_is_seen_by_all(kind: str, mode: str) -> None:
    mesh, tx = mesh_of(kind, mode), swa(EVERY)
    params = placed(mesh)
    state = jax.jit(tx.init)(params)
    update = jax.jit(
        lambda state, params: tx.update(params, state, jax.tree.map(jnp.copy, params))[1]
    )
    sharded = [name for name, leaf in params.items() if not leaf.is_fully_replicated]
    cases = [(name, device) for name in sharded[:4] for device in mesh.devices.flat]
    for name, device in [*cases, ("replicated", jax.devices()[0]), ("scalar", jax.devices()[0])]:
        bad = placed(mesh, values() | {name: with_nan(params[name], device)})
        after = update(state, bad)
        told = [int(shard.data) for shard in after.n_skipped.addressable_shards]
        assert told == [1] * 8, (name, device, told)
        same_bits(host(after.average), host(state.average))
    assert n_averaged(update(state, params)) == 1


def check_what_fills_up_uneven_shards_is_no_parameter(kind: str, mode: str) -> None:
    """XLA takes rows of 8, in even shards, and leaves infinite ones behind those that it needs."""
    del mode  # explicit shardings are always even
    where = NamedSharding(mesh_of(kind), P("data"))
    tx = swa(EVERY)
    for rows in (5, 6):
        params = {"w": jnp.zeros(rows)}

        @jax.jit
        def update(state: Any, params: Any, exponents: Any) -> Any:
            updates = {"w": jnp.exp(exponents)[: params["w"].shape[0]]}
            updates, state = tx.update(updates, state, params)
            return state, optax.apply_updates(params, updates)

        exponents = jax.device_put(np.where(np.arange(8) < rows, 0, 1000).astype("f4"), where)
        state, after = update(tx.init(params), params, exponents)
        assert (n_averaged(state), n_skipped(state)) == (1, 0)
        same_bits(host(state.average), host(after))
        exponents = jax.device_put(np.where(np.arange(8) < rows - 1, 0, 1000).astype("f4"), where)
        assert n_skipped(update(tx.init(params), params, exponents)[0]) == 1


def check_inside_of_a_scan(kind: str, mode: str) -> None:
    tx, params = optimizer(), placed(mesh_of(kind, mode))

    @jax.jit
    def epoch(params: Any, state: Any, xs: Any) -> Any:
        step = stepper(tx)
        return jax.lax.scan(lambda carry, x: (step(*carry, x), None), (params, state), xs)[0]

    state = jax.jit(tx.init)(params)
    text = epoch.lower(params, state, inputs()).compile().as_text()
    assert collectives(text) == [Collective("all-reduce", "s32[]", conditional=True)]
    _, state = epoch(params, state, inputs())
    lies_as(state[1].average, params)
    assert n_averaged(state) == 3


def within(kind: str, mode: str, is_set: bool, check: Any) -> None:
    with jax.set_mesh(mesh_of(kind, mode)) if is_set else contextlib.nullcontext():
        check(kind, mode)


ALL = [check for name, check in list(globals().items()) if name.startswith("check_")]
# The others are the same where the mesh has one axis, or where none is set.
OF_EVERY_MESH = [
    check_the_average_is_made_where_the_parameters_lie,
    check_it_stays_there_through_donated_updates,
    check_one_number_goes_round_where_nonfinite_is_skipped,
    check_a_nan_on_any_device_is_seen_by_all,
]
OF_THE_COMPILER = [check_what_fills_up_uneven_shards_is_no_parameter]
RUNS = {
    "line": ("line", "Auto", False, OF_EVERY_MESH),
    "grid": ("grid", "Auto", False, ALL),
    "grid-explicit": ("grid", "Explicit", False, OF_EVERY_MESH[:2]),
    "grid-explicit-set": ("grid", "Explicit", True, [c for c in ALL if c not in OF_THE_COMPILER]),
}
CHECKS = {
    f"{run}-{check.__name__.removeprefix('check_')}": partial(within, *where, check)
    for run, (*where, checks) in RUNS.items()
    for check in checks
}
