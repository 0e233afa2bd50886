"""Two processes over gloo, of which each sees its own shards alone.

numpy cannot touch such arrays: JAX raises where somebody tries.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from adapter_optax.distributed.batch_statistics import are_those_of_all, updated
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
    whole,
    with_nan,
)
from jax.experimental import multihost_utils

import swa_core
from swa_core import SWAConfig
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
    swa,
)
from swa_optax import init as loop_init

EVERY = SWAConfig(start="1step", every="1step")


def told_alike(tree: Any) -> None:
    """That both processes hold the same."""
    multihost_utils.assert_equal(tree)


@cache
def trained(kind: str) -> Any:
    tx, params = optimizer(), placed(mesh_of(kind))
    step, state, recorded, states = stepper(tx), jax.jit(tx.init)(params), [], []
    for x in inputs():
        params, state = step(params, state, x)
        recorded.append(host(params))
        states.append((params, state))
    return states, recorded


def check_both_have_the_average(kind: str) -> None:
    states, recorded = trained(kind)
    params, state = states[-1]
    assert not params["rows"].is_fully_addressable
    is_the_cores(state[1], recorded)
    told_alike(host(state[1]))
    lies_as(state[1].average, params)
    assert (n_averaged(state), n_skipped(state)) == (3, 0)


def check_eager_init_and_updates(kind: str) -> None:
    tx, params = swa(EVERY), placed(mesh_of(kind))
    state = tx.init(params)
    lies_as(state.average, params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    lies_as(state.average, params)
    same_bits(host(averaged_params(state, params)), values())


def check_read_out_it_lies_where_the_parameters_do(kind: str) -> None:
    params, state = trained(kind)[0][-1]
    average = host(state[1].average)
    for read in (averaged_params, jax.jit(averaged_params), finalize):
        found = read(state, params)
        lies_as(found, params)
        same_bits(host(found), average | {"half": average["half"].astype(jnp.bfloat16)})


def check_a_nan_of_one_process_is_left_out_by_both(kind: str) -> None:
    params, tx = placed(mesh_of(kind)), swa(EVERY)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def update(state: Any, params: Any) -> Any:
        return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1]

    text = update.lower(state, params).compile().as_text()
    assert collectives(text) == [Collective("all-reduce", "s32[]", conditional=True)]
    for device in jax.devices():
        for name in ("both", "rows"):
            bad = placed(mesh_of(kind), values() | {name: with_nan(params[name], device)})
            after = update(state, bad)
            told_alike((after.n_averaged, after.n_skipped))
            assert (n_averaged(after), n_skipped(after)) == (0, 1), (name, device)
            assert n_skipped(accumulate(loop_init(params), bad)) == 1
    assert n_averaged(update(state, params)) == 1


def check_the_dictionary_holds_the_whole_average(kind: str) -> None:
    states, _ = trained(kind)
    params, state = states[2]
    saved = state_to_dict(state, schedule=CONFIG.schedule(), rule=CONFIG.rule)
    told_alike(saved["average"])
    same_bits(saved["average"], host(state[1].average))
    empty = jax.jit(optimizer().init)(placed(mesh_of(kind), values(5)))
    found = state_from_dict(saved, empty, schedule=CONFIG.schedule(), rule=CONFIG.rule)
    lies_as(found[1].average, params)
    step = stepper(optimizer())
    for x in inputs()[3:]:
        params, found = step(params, found, x)
    same_bits(host((params, found)), host(states[-1]))


def check_one_file_is_written_by_both_and_read_by_both(kind: str) -> None:
    params, state = trained(kind)[0][-1]
    path = f"{kind}.safetensors"
    save_average(path, state, CONFIG, schedule=CONFIG.schedule())
    multihost_utils.sync_global_devices("written")
    same_bits(swa_core.load_average(path).state.average, host(state[1].average))
    tx = optimizer()
    for init in (tx.init, jax.jit(tx.init)):
        found = load_average(path, init(placed(mesh_of(kind), values(5))), config=CONFIG)
        lies_as(found[1].average, params)
        same_bits(host(found), host(state))


def check_before_the_first_snapshot_the_file_leaves_the_arrays(kind: str) -> None:
    tx, params = optimizer(), placed(mesh_of(kind))
    state, path = jax.jit(tx.init)(params), f"{kind}-empty.safetensors"
    save_average(path, state, CONFIG)
    multihost_utils.sync_global_devices("written")
    found = load_average(path, state)
    lies_as(found[1].average, params)
    same_bits(host(found), host(state))


def check_orbax_restores_on_another_mesh(kind: str) -> None:
    other = {"pairs": "across", "across": "pairs"}[kind]
    states, _ = trained(kind)
    # Every process says the same folder.
    with ocp.StandardCheckpointer() as checkpointer:
        folder = os.path.abspath(f"orbax-{kind}")
        checkpointer.save(folder, states[2])
        checkpointer.wait_until_finished()
        target = placed(mesh_of(other), values(5))
        params, state = checkpointer.restore(folder, (target, jax.jit(optimizer().init)(target)))
    lies_as(state[1].average, shardings(mesh_of(other)))
    step = stepper(optimizer())
    for x in inputs()[3:]:
        params, state = step(params, state, x)
    same_bits(host((params, state)), host(states[-1]))


def check_update_bn_pools_what_both_have(kind: str) -> None:
    kernel = P(None, "model") if kind == "across" else P()
    stats = updated(mesh_of(kind), kernel)
    are_those_of_all(stats)
    told_alike(jax.tree.map(whole, stats))


ALL = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
# What is the same, whichever part of an array is in which process.
ONCE = (
    "check_eager_init_and_updates",
    "check_before_the_first_snapshot_the_file_leaves_the_arrays",
)
CHECKS = {
    f"{kind}-{name.removeprefix('check_')}": partial(check, kind)
    for kind in ("pairs", "across")
    for name, check in ALL.items()
    if kind == "across" or name not in ONCE
}
