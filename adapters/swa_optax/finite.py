"""Whether parameters are finite: one pass over them, one number out of it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from swa_optax.paths import average_dtype

Leaves = list[jax.Array]


def all_finite(leaves: Leaves) -> jax.Array:
    """Whether no element of floating or complex arrays is NaN or infinite, as a boolean scalar.

    A sum is NaN or infinite if an element is; one that only overflows is looked at again. The
    maximum would tell at once, but XLA's own on the CPU loses NaN in arrays of 4096 elements and
    more (jaxlib 0.10.2); ``all(isfinite(...))`` writes its booleans to memory. Of all reductions
    the sum alone runs at the speed of memory there.

    >>> largest = jnp.full(2, 3e38)
    >>> bool(all_finite([largest])), bool(all_finite([largest, jnp.array([1.0, jnp.nan])]))
    (True, False)
    """
    total = _sum(_real(leaves))
    return lax.cond(jnp.isfinite(total), _is_finite, _each_finite, total, leaves)


def each_finite(leaves: Leaves) -> jax.Array:
    """The same in one look, which takes longer than the first of the two."""
    # Of NaN and infinity the difference to itself is NaN. (A product with zero would be as well,
    # but XLA writes as many zeros to memory for it.)
    return _sum(part - part for part in _real(leaves)) == 0


def _is_finite(total: jax.Array, leaves: Leaves) -> jax.Array:
    # No constant: inside of shard_map it has to differ between the shards as the leaves do.
    return jnp.isfinite(total)


def _each_finite(total: jax.Array, leaves: Leaves) -> jax.Array:
    return each_finite(leaves)


def _sum(parts: Iterator[jax.Array]) -> jax.Array:
    # One number: a chain of a boolean for each of a thousand leaves takes a minute to compile.
    return sum((jnp.sum(part).astype(jnp.float32) for part in parts), jnp.float32(0))


def _real(leaves: Leaves) -> Iterator[jax.Array]:
    """Real arrays in float32 or wider with the values of leaves."""
    for leaf in leaves:
        wide = leaf.astype(average_dtype(leaf))
        yield from (wide.real, wide.imag) if jnp.iscomplexobj(wide) else (wide,)
