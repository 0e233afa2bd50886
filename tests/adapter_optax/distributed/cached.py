"""With a compilation cache on disk: what is compiled has to be found by the next process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from adapter_optax.distributed.hlo import Collective, collectives
from adapter_optax.distributed.training import mesh_of, placed, values, with_nan

from swa_core import SWAConfig
from swa_optax import n_averaged, n_skipped, swa

FLAG = "jax_remove_custom_partitioning_ptr_from_cache_key"


@contextlib.contextmanager
def cache(**flags: Any) -> Iterator[None]:
    # One folder for all, which stays: JAX goes on with the first that it has used.
    flags = {"jax_compilation_cache_dir": os.path.abspath("compiled"), **flags}
    before = {name: getattr(jax.config, name) for name in flags}
    for name, value in flags.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def lowered(params: Any) -> tuple[Any, Any]:
    tx = swa(SWAConfig(start="1step", every="1step"))
    state = jax.jit(tx.init)(params)

    def update(state: Any, params: Any) -> Any:
        return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1]

    return jax.jit(update).lower(state, params), state


def check_what_is_kept_has_no_address_of_this_process_in_it() -> None:
    params = placed(mesh_of("grid"))
    with cache():
        program, state = lowered(params)
        assert "CustomSPMDPartitioning" not in program.as_text()
        update = program.compile()
    told = collectives(update.as_text())
    assert told
    assert all(one.kind == "all-reduce" and one.conditional for one in told)
    assert n_averaged(update(state, params)) == 1
    for device in jax.devices():
        for name in ("both", "rows"):
            bad = placed(mesh_of("grid"), values() | {name: with_nan(params[name], device)})
            assert n_skipped(update(state, bad)) == 1, (name, device)


def check_one_number_where_jax_is_told_to_look_past_it() -> None:
    with cache(**{FLAG: True}):
        program, _ = lowered(placed(mesh_of("grid")))
        assert "CustomSPMDPartitioning" in program.as_text()
        text = program.compile().as_text()
    assert collectives(text) == [Collective("all-reduce", "s32[]", conditional=True)]


CHECKS = {
    f"cached-{name.removeprefix('check_')}": check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
