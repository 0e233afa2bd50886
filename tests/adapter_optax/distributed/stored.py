"""Saved on one mesh, restored on another; read out, and loaded to where the parameters lie."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from adapter_optax.distributed.hlo import Collective, collectives
from adapter_optax.distributed.training import (
    CONFIG,
    UPDATES,
    host,
    inputs,
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

import swa_core
from swa_core import EMA
from swa_optax import (
    accumulate,
    averaged_params,
    finalize,
    load_average,
    n_averaged,
    n_skipped,
    save_average,
    state_from_dict,
    state_to_dict,
    wrap,
)
from swa_optax import init as loop_init


def trained(
    kind: str, first: int = 0, last: int = UPDATES, start: Any = None, **options: Any
) -> Any:
    """Parameters and state on a mesh after updates ``first`` to ``last``."""
    tx = optimizer(**options)
    params, state = start or (placed(mesh_of(kind)), None)
    if state is None:
        state = jax.jit(tx.init)(params)
    step = stepper(tx)
    for x in inputs()[first:last]:
        params, state = step(params, state, x)
    return params, state


def where(kind: str) -> Any:
    """An empty training on a mesh, as the target of a restoring."""
    tx, params = optimizer(), placed(mesh_of(kind), values(seed=5))
    return params, jax.jit(tx.init)(params)


def check_orbax_restores_on_another_mesh() -> None:
    whole = trained("line")
    before = trained("line", last=3)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        for number, kind in enumerate(("grid", "one")):
            checkpointer.save(f"{folder}/{number}", before)
            checkpointer.wait_until_finished()
            target = where(kind)
            before = checkpointer.restore(f"{folder}/{number}", target)
            lies_as(before[0], shardings(mesh_of(kind)))
            lies_as(before[1][1].average, shardings(mesh_of(kind)))
            # Update 4 on 4 x 2 devices, 5 and 6 on one.
            before = trained(kind, 3 + number, 4 + 2 * number, before)
    assert n_averaged(before[1]) == 3
    same_bits(host(before), host(whole))


def check_orbax_restores_from_shapes_alone() -> None:
    _, state = trained("line", last=3)
    tx = optimizer()
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        values(),
        shardings(mesh_of("grid")),
    )
    places = jax.jit(tx.init).lower(abstract).compile().output_shardings
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(tx.init, abstract),
        places,
    )
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(f"{folder}/state", target)
    lies_as(found[1].average, shardings(mesh_of("grid")))
    same_bits(host(found), host(state))


def check_the_dictionary_on_another_mesh() -> None:
    whole, (params, state) = trained("line"), trained("line", last=3)
    saved = state_to_dict(state, schedule=CONFIG.schedule(), rule=CONFIG.rule)
    for kind in ("grid", "one"):
        _, empty = where(kind)
        found = state_from_dict(saved, empty, schedule=CONFIG.schedule(), rule=CONFIG.rule)
        lies_as(found[1].average, shardings(mesh_of(kind)))
        same_bits(host(found[1]), host(state[1]))
        # Counters lie as those that they replace: a step that took these takes those.
        for now, before in zip(found[1][:4], empty[1][:4], strict=True):
            assert now.sharding == before.sharding
        moved = placed(mesh_of(kind), host(params))
        same_bits(host(trained(kind, 3, UPDATES, (moved, found))), host(whole))


def check_loading_compiles_nothing_again() -> None:
    tx, params = optimizer(), placed(mesh_of("grid"))
    step, state = stepper(tx), jax.jit(tx.init)(params)
    for x in inputs():
        params, state = step(params, state, x)
    compiled = step._cache_size()
    found = state_from_dict(state_to_dict(state), state)
    step(params, found, inputs()[0])
    assert step._cache_size() == compiled


def check_the_file_on_another_mesh() -> None:
    _, state = trained("line")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/average.safetensors"
        save_average(path, state, CONFIG, schedule=CONFIG.schedule())
        for name, leaf in swa_core.load_average(path).state.average.items():
            same_bits(leaf, np.asarray(state[1].average[name]))
        found = load_average(path, where("grid")[1], config=CONFIG, schedule=CONFIG.schedule())
        lies_as(found[1].average, shardings(mesh_of("grid")))
        same_bits(host(found[1]), host(state[1]))
        # Before the first snapshot the file has no arrays, and those of the state stay.
        save_average(path, trained("line", last=1)[1], CONFIG)
        found = load_average(path, where("grid")[1])
        lies_as(found[1].average, shardings(mesh_of("grid")))
        same_bits(host(found[1].average), host(where("grid")[1][1].average))


def check_a_large_array_is_never_whole_on_one_device() -> None:
    """Where a model is too large for one device, loading must not need one that holds it."""
    _, empty = where("grid")
    saved = state_to_dict(trained("grid")[1])
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        found = state_from_dict(saved, empty)
    lies_as(found[1].average, shardings(mesh_of("grid")))


def check_a_loop_of_ones_own() -> None:
    """``init`` and ``accumulate``: where the parameters lie, and one number goes round."""
    mesh = mesh_of("grid")
    params = placed(mesh)
    state = loop_init(params)
    lies_as(state.average, params)
    recorded = swa_core.init(host(params))
    every = swa_core.Schedule(1, 1)
    for seed in range(3):
        drawn = values(seed)
        state = accumulate(state, placed(mesh, drawn), rule=EMA(0.5))
        recorded = swa_core.update(recorded, drawn, every, EMA(0.5))
        lies_as(state.average, params)
    for name, leaf in recorded.average.items():
        np.testing.assert_allclose(state.average[name], leaf, rtol=2e-6, atol=1e-7)
    bad = with_nan(params["turned"], jax.devices()[6])
    state = accumulate(state, placed(mesh, values() | {"turned": bad}), rule=EMA(0.5))
    assert (n_averaged(state), n_skipped(state)) == (3, 1)
    for nonfinite, told in (("skip", ["all-reduce"]), ("keep", [])):
        join = jax.jit(partial(accumulate, nonfinite=nonfinite))
        text = join.lower(loop_init(params), params).compile().as_text()
        assert [one.kind for one in collectives(text)] == told


def check_the_wrapper_says_no_more() -> None:
    params = placed(mesh_of("grid"))
    tx = wrap(optax.MultiSteps(optax.sgd(0.25), 2), CONFIG)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies an integer by a boolean
        state = jax.jit(tx.init)(params)
        lies_as(state[1].average, params)
        step = stepper(tx, donate_argnums=(0, 1))
        text = step.lower(params, state, np.float32(1)).compile().as_text()
        assert collectives(text) == [Collective("all-reduce", "s32[]", conditional=True)]
        for x in inputs(8):
            params, state = step(params, state, x)
    lies_as(state[1].average, params)
    assert n_averaged(state) == 2


def check_in_the_memory_of_the_host() -> None:
    mesh = mesh_of("grid")
    tx = optimizer(memory_kind="pinned_host")
    expected = trained("grid")[1]
    on_host = {
        name: place.with_memory_kind("pinned_host") for name, place in shardings(mesh).items()
    }
    for init in (tx.init, jax.jit(tx.init)):
        params = placed(mesh)
        state, step = init(params), stepper(tx, donate_argnums=(0, 1))
        lies_as(state[1].average, on_host)
        text = step.lower(params, state, np.float32(1)).compile().as_text()
        assert collectives(text) == [Collective("all-reduce", "s32[]", conditional=True)]
        for x in inputs():
            params, state = step(params, state, x)
            lies_as(state[1].average, on_host)
            lies_as(params, shardings(mesh))
        same_bits(host(state), host(expected))
    average = host(expected[1].average)
    for read in (averaged_params, jax.jit(averaged_params), finalize):
        found = read(state, params)
        lies_as(found, shardings(mesh))
        same_bits(host(found), average | {"half": average["half"].astype(jnp.bfloat16)})
    loaded = state_from_dict(state_to_dict(state), jax.jit(tx.init)(params))
    lies_as(loaded[1].average, on_host)
    same_bits(host(loaded), host(expected))


CHECKS = {
    f"stored-{name.removeprefix('check_')}": check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
