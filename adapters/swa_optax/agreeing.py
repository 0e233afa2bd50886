"""Whether a snapshot holds NaN or Inf: one answer, on which all devices agree.

Left to itself, the compiler reduces each leaf over all devices, along one mesh axis after the
other. Here each device looks at what it has of all leaves, and what it found goes round as one
integer, in whose maximum no NaN can be lost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swa_optax import finite

Leaves = list[jax.Array]


def finite_everywhere(leaves: Leaves, count: jax.Array) -> jax.Array:
    """Whether no leaf holds NaN or Inf, on any device.

    Inside of ``shard_map`` the shards answer together along the axes over which the leaves differ
    and the counter does not; where the counter differs too, each is a training of its own. Where
    JAX does not know what differs (``check_vma=False``, and ``pmap`` with an axis name), they
    answer together along all axes.

    Args:
      leaves: floating-point or complex arrays, sharded in any way.
      count: the counter of updates [>= 0].

    >>> bool(finite_everywhere([jnp.ones(2), jnp.array(jnp.nan)], jnp.int32(1)))
    False
    """
    return looking()(leaves, count)


def looking() -> Callable[[Leaves, jax.Array], jax.Array]:
    """``finite_everywhere`` in the form that goes with how JAX keeps what it compiles.

    Where compiled programs are kept on disk, another process has to find this one again. With
    ``custom_partitioning`` in it, it does not, unless JAX is told that such functions are always
    the same, as ours is; then the compiler has to reduce leaf by leaf, as it would by itself.

    The functions are always the same: ``lax.cond`` knows what it has traced by their identity.
    """
    flag = "jax_remove_custom_partitioning_ptr_from_cache_key"
    is_kept, is_found = jax.config.jax_compilation_cache_dir, getattr(jax.config, flag, False)
    return _leaf_by_leaf if is_kept and not is_found else _all_at_once


def _all_at_once(leaves: Leaves, count: jax.Array) -> jax.Array:
    manual, others = _mesh_axes()
    # What is left to the compiler inside of shard_map, it has to divide itself.
    return _answered(_bad if manual and others else _bad_anywhere, leaves, count)


def _leaf_by_leaf(leaves: Leaves, count: jax.Array) -> jax.Array:
    return _answered(_bad, leaves, count)


def _answered(look: Callable[..., jax.Array], leaves: Leaves, count: jax.Array) -> jax.Array:
    if not leaves:
        return count >= 0
    bad = look(*(lax.stop_gradient(leaf) for leaf in leaves))
    axes = _answering_together(_mesh_axes()[0], bad, count)
    if axes:
        bad = lax.pmax(bad, axes)
    # Differs over the axes over which the counter does, as ``not_read`` does.
    return (bad == 0) & (count >= 0)


def not_read(leaves: Leaves, count: jax.Array) -> jax.Array:
    """False, of the type of ``finite_everywhere``: the other branch of a condition."""
    return count < 0


def _mesh_axes() -> tuple[list[str], bool]:
    """The axes along which ``shard_map`` or ``pmap`` took the arrays apart; whether others are."""
    if not hasattr(jax, "typeof"):  # before JAX 0.6, which knows nothing of it
        return [], False
    mesh = jax.sharding.get_abstract_mesh()
    # A pmap without a name, which JAX gives one of its own, says that nothing is shared.
    manual = [axis for axis in mesh.manual_axes if not axis.startswith("_")]
    return manual, len(manual) < len(mesh.axis_names)


def _answering_together(manual: list[str], bad: jax.Array, count: jax.Array) -> tuple[str, ...]:
    if not manual:
        return ()
    known = all(axis in _differing(lax.axis_index(axis)) for axis in manual)
    axes = _differing(bad) - _differing(count) if known else manual
    return tuple(axis for axis in manual if axis in axes)


def _differing(array: jax.Array) -> frozenset[Any]:
    """The axes of ``shard_map`` over which an array differs, as far as JAX knows."""
    described = jax.typeof(array)
    manual = getattr(described, "manual_axis_type", None)
    return manual.varying if manual is not None else getattr(described, "vma", frozenset())


def _bad(*leaves: jax.Array) -> jax.Array:
    """1 where the leaves hold NaN or Inf, else 0; int32, which no backend compares wrongly."""
    return 1 - finite.all_finite([*leaves]).astype(jnp.int32)


def _bad_in_one_look(*leaves: jax.Array) -> jax.Array:
    """The same in one look: for the members of an ensemble a condition saves nothing."""
    return 1 - finite.each_finite([*leaves]).astype(jnp.int32)


_bad_on_all_devices = custom_partitioning(_bad)


def _partition(mesh: Mesh, leaves: Any, bad: Any) -> tuple[Any, ...]:
    """What each device does, and how the leaves are sharded for it: as they come."""
    devices = leaves[0].sharding._device_assignment if mesh.empty else mesh.devices.flat
    everywhere = Mesh(np.array([*devices]), ("devices",))
    whole = NamedSharding(everywhere, PartitionSpec())
    # An uneven shard is filled up with whatever was there, which may be NaN. Parameters are even;
    # XLA may divide what they are computed from otherwise.
    shardings = tuple(leaf.sharding if _is_even(leaf) else whole for leaf in leaves)
    is_sharded = not all(sharding.is_fully_replicated for sharding in shardings)

    def on_each_device(*leaves: jax.Array) -> jax.Array:
        bad = _bad(*leaves)
        return lax.pmax(bad, "devices") if is_sharded else bad

    return everywhere, on_each_device, whole, shardings


def _is_even(leaf: Any) -> bool:
    try:
        leaf.sharding.shard_shape(leaf.shape)
    except ValueError:
        return False
    return True


def _replicated(mesh: Mesh, leaves: Any, bad: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _dimensions(mesh: Mesh, leaves: Any, bad: Any) -> str:
    """Every dimension of every leaf with a name of its own: none has to be sharded as another."""
    names = (f"d{number}" for number in range(sum(leaf.rank for leaf in leaves)))
    terms = [" ".join(next(names) for _ in range(leaf.rank)) for leaf in leaves]
    return ", ".join(terms) + " ->"


# XLA has two partitioners; JAX before 0.5 knows but the older one.
_rules: dict[str, Any] = {"infer_sharding_from_operands": _replicated}
if "sharding_rule" in inspect.signature(_bad_on_all_devices.def_partition).parameters:
    _rules["sharding_rule"] = _dimensions
_bad_on_all_devices.def_partition(partition=_partition, **_rules)


@custom_vmap
def _bad_anywhere(*leaves: jax.Array) -> jax.Array:
    return _bad_on_all_devices(*leaves)


@_bad_anywhere.def_vmap
def _bad_members(size: int, batched: list[bool], *leaves: jax.Array) -> tuple[jax.Array, bool]:
    """Each member of an ensemble for itself."""
    axes = [0 if is_batched else None for is_batched in batched]
    return jax.vmap(_bad_in_one_look, in_axes=axes)(*leaves), True
