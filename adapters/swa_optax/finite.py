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
    return lax.cond(jnp.isfinite(_sum(_real(leaves))), _true, _each_finite, leaves)


def not_read(leaves: Leaves) -> jax.Array:
    """The answer of ``all_finite`` where nobody asks."""
    return jnp.array(False)


def _each_finite(leaves: Leaves) -> jax.Array:
    # Of NaN and infinity the difference to itself is NaN. (A product with zero would be as well,
    # but XLA writes as many zeros to memory for it.)
    return _sum(part - part for part in _real(leaves)) == 0


def _true(leaves: Leaves) -> jax.Array:
    return jnp.array(True)


def _sum(parts: Iterator[jax.Array]) -> jax.Array:
    # One number: a chain of a boolean for each of a thousand leaves takes a minute to compile.
    return sum((jnp.sum(part).astype(jnp.float32) for part in parts), jnp.float32(0))


def _real(leaves: Leaves) -> Iterator[jax.Array]:
    """Real arrays in float32 or wider with the values of leaves."""
    for leaf in leaves:
        wide = leaf.astype(average_dtype(leaf))
        yield from (wide.real, wide.imag) if jnp.iscomplexobj(wide) else (wide,)
