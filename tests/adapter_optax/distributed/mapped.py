"""Inside of ``shard_map``, ``pmap`` and ``vmap``, where each device sees its own part alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adapter_optax.distributed.hlo import Collective, collectives
from adapter_optax.distributed.training import (
    SPECS,
    P,
    host,
    lies_as,
    mesh_of,
    placed,
    same_bits,
    shardings,
    values,
    with_nan,
)

from swa_core import SWAConfig, SWAState
from swa_optax import averaged_params, n_averaged, n_skipped, swa

EVERY = SWAConfig(start="1step", every="1step")
COUNTERS = SWAState(P(), P(), P(), P(), SPECS)  # of one training, whose parameters are sharded
ONE = Collective("all-reduce", "s32[]", conditional=True)
# As long as the ensemble: member 2 is spoilt in its last weight.
MEMBERS = np.where(np.arange(16).reshape(8, 2) == 5, np.nan, 1.0).astype("f4")


def after(params: Any, state: SWAState, config: SWAConfig = EVERY) -> SWAState:
    zero = jax.tree.map(jnp.zeros_like, params)
    return swa(config).update(zero, state, params)[1]


def fresh(params: Any) -> SWAState:
    return after(params, swa(EVERY).init(jax.tree.map(jnp.ones_like, params)))


def lists(*counters: Any) -> list[Any]:
    return [np.ravel(counter).tolist() for counter in counters]


def sharded_training(checked: bool, config: SWAConfig = EVERY, **rest: Any) -> Any:
    return jax.jit(
        jax.shard_map(
            partial(after, config=config),
            mesh=mesh_of("grid"),
            in_specs=(SPECS, COUNTERS),
            out_specs=COUNTERS,
            check_vma=checked,
            **rest,
        )
    )


def check_the_shards_of_one_training_decide_together(checked: bool) -> None:
    params = placed(mesh_of("grid"))
    state = swa(EVERY).init(params)
    update = sharded_training(checked)
    assert collectives(update.lower(params, state).compile().as_text()) == [ONE]
    good = update(params, state)
    lies_as(good.average, params)
    same_bits(host(good.average), {name: leaf.astype("f4") for name, leaf in values().items()})
    assert lists(good.n_averaged, good.n_skipped) == [[1], [0]]
    for name in ("both", "turned", "together", "rows", "columns", "replicated"):
        bad = placed(mesh_of("grid"), values() | {name: with_nan(params[name], jax.devices()[3])})
        now = update(bad, good)
        for counter, wanted in ((now.n_averaged, 1), (now.n_skipped, 1)):
            assert [int(shard.data) for shard in counter.addressable_shards] == [wanted] * 8, name
        same_bits(host(now.average), host(good.average))


def check_kept_or_replicated_they_say_as_little_as_they_can(checked: bool) -> None:
    params = placed(mesh_of("grid"))
    kept = sharded_training(checked, SWAConfig(start="1step", every="1step", nonfinite="keep"))
    state = swa(EVERY).init(params)
    assert collectives(kept.lower(params, state).compile().as_text()) == []
    whole = {name: params[name] for name in ("replicated", "scalar")}
    update = jax.shard_map(
        fresh, mesh=mesh_of("grid"), in_specs=P(), out_specs=P(), check_vma=checked
    )
    told = collectives(jax.jit(update).lower(whole).compile().as_text())
    assert told == ([] if checked else [ONE])  # unchecked, nobody knows that they are the same
    assert n_averaged(jax.jit(update)(whole)) == 1


def check_the_state_can_be_made_inside(checked: bool) -> None:
    params = placed(mesh_of("grid"))
    init = jax.shard_map(
        swa(EVERY).init,
        mesh=mesh_of("grid"),
        in_specs=(SPECS,),
        out_specs=COUNTERS,
        check_vma=checked,
    )
    state = jax.jit(init)(params)
    lies_as(state.average, params)
    read = jax.shard_map(
        averaged_params,
        mesh=mesh_of("grid"),
        in_specs=(COUNTERS, SPECS),
        out_specs=SPECS,
        check_vma=checked,
    )
    found = jax.jit(read)(sharded_training(checked)(params, state), params)
    lies_as(found, params)
    same_bits(host(found), values())


def check_part_of_the_axes_left_to_the_compiler(checked: bool) -> None:
    mesh, names = mesh_of("grid"), ("rows", "columns", "replicated")
    specs = {"rows": P("data"), "columns": P(), "replicated": P()}
    state_specs = SWAState(P(), P(), P(), P(), specs)
    update = jax.jit(
        jax.shard_map(
            after,
            mesh=mesh,
            in_specs=(specs, state_specs),
            out_specs=state_specs,
            axis_names={"data"},
            check_vma=checked,
        )
    )
    params = {name: placed(mesh)[name] for name in names}
    state = swa(EVERY).init(params)
    told = collectives(update.lower(params, state).compile().as_text())
    assert all(one.kind == "all-reduce" and one.conditional for one in told)
    for name, device in (("rows", 7), ("columns", 1), ("columns", 6), ("replicated", 0)):
        bad = params | {
            name: jax.device_put(
                with_nan(params[name], jax.devices()[device]), shardings(mesh)[name]
            )
        }
        assert n_skipped(update(bad, state)) == 1, name
    lies_as(update(params, state).average, params)


def check_members_of_an_ensemble_decide_for_themselves() -> None:
    """Their counters differ from device to device, as far as JAX knows."""

    def member(params: Any) -> SWAState:
        own = {"w": params["w"][0]}
        state = swa(EVERY).init(jax.tree.map(jnp.ones_like, own))
        counters = jax.lax.pcast(state._replace(average=None), ("data",), to="varying")
        state = after(own, counters._replace(average=state.average))
        return jax.tree.map(lambda leaf: leaf[None], state)

    train = jax.shard_map(
        member, mesh=mesh_of("line"), in_specs=({"w": P("data")},), out_specs=P("data")
    )
    state = jax.jit(train)({"w": MEMBERS})
    assert lists(state.n_averaged, state.n_skipped) == [
        [1, 1, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]
    text = jax.jit(train).lower({"w": MEMBERS}).compile().as_text()
    assert collectives(text) == []


def check_pmap() -> None:
    alone = jax.pmap(fresh)({"w": MEMBERS})
    assert n_averaged(alone).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert n_skipped(alone).tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    read = jax.pmap(averaged_params)(alone, {"w": jnp.full((8, 2), 7.0)})
    np.testing.assert_array_equal(read["w"][1:4], [[1, 1], [7, 7], [1, 1]])
    # Devices with a common axis name train one model: they decide together.
    together = jax.pmap(fresh, axis_name="batch")({"w": MEMBERS})
    assert n_skipped(together).tolist() == [1] * 8
    assert n_averaged(jax.pmap(fresh, axis_name="batch")({"w": np.ones((8, 2), "f4")})).sum() == 8


def check_a_state_of_pmap_goes_on_under_jit() -> None:
    """What ``pmap`` returns is sharded along an axis of its own."""
    state = jax.pmap(fresh)({"w": np.ones((8, 2), "f4")})
    state = jax.tree.map(lambda leaf: leaf[0], state)._replace(average=state.average)
    params = jax.pmap(lambda x: x)(MEMBERS)
    assert lists(*jax.jit(after)({"w": params}, state)[1:3]) == [[1], [1]]


def check_a_sharded_ensemble_under_vmap() -> None:
    mesh = mesh_of("grid")
    weights = np.ones((4, 6, 2), "f4")
    weights[2, 5, 1] = np.nan
    where = jax.sharding.NamedSharding(mesh, P("data", None, "model"))
    params = {"w": jax.device_put(weights, where), "b": jnp.ones((4, 3))}
    state = jax.jit(jax.vmap(swa(EVERY).init))(params)
    assert state.average["w"].sharding.is_equivalent_to(where, 3)
    for spmd in (None, "data"):
        update = jax.jit(jax.vmap(after, spmd_axis_name=spmd))
        now = update(params, state)
        assert lists(now.n_averaged, now.n_skipped) == [[1, 1, 0, 1], [0, 0, 1, 0]]
        assert now.average["w"].sharding.is_equivalent_to(where, 3)
    # Between the shards of a member, and none between members.
    told = collectives(update.lower(params, state).compile().as_text())
    assert [one.kind for one in told] == ["all-reduce"]
    kept = partial(after, config=SWAConfig(start="1step", every="1step", nonfinite="keep"))
    compiled = jax.jit(jax.vmap(kept, spmd_axis_name="data")).lower(params, state).compile()
    assert collectives(compiled.as_text()) == []


def check_differentiated_around() -> None:
    params = placed(mesh_of("grid"))
    params = {name: params[name] for name in ("both", "replicated")}

    def total(scale: Any) -> Any:
        _, state = swa(EVERY).update(
            jax.tree.map(lambda leaf: scale * leaf, params), swa(EVERY).init(params), params
        )
        read = averaged_params(state, params)
        return sum(leaf.sum() for leaf in jax.tree.leaves(read))

    expected = sum(float(leaf.sum()) for leaf in params.values())
    for gradient in (jax.jit(jax.grad(total)), jax.jit(jax.jacfwd(total))):
        np.testing.assert_allclose(gradient(0.5), expected, rtol=1e-5)


OF_BOTH = (
    check_the_shards_of_one_training_decide_together,
    check_kept_or_replicated_they_say_as_little_as_they_can,
    check_the_state_can_be_made_inside,
    check_part_of_the_axes_left_to_the_compiler,
)
OTHERS = (
    check_members_of_an_ensemble_decide_for_themselves,
    check_pmap,
    check_a_state_of_pmap_goes_on_under_jit,
    check_a_sharded_ensemble_under_vmap,
    check_differentiated_around,
)
CHECKS = {
    f"{kind}-{check.__name__.removeprefix('check_')}": partial(check, kind == "shard_map")
    for kind in ("shard_map", "shard_map_unchecked")
    for check in OF_BOTH
} | {f"mapped-{check.__name__.removeprefix('check_')}": check for check in OTHERS}
