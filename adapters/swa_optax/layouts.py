"""The average by the paths of the parameters, out of wrappers that lay parameters out otherwise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swa_optax.memory import to_device
from swa_optax.paths import Path, Tree, is_averaged, leaves


def as_the_parameters(average: dict[Path, Any], params: Tree) -> dict[Path, Any]:
    """The leaves of an average under the paths, and in the shapes, of the parameters.

    ``optax.flatten`` shows its optimizer one vector of all leaves, and
    ``optax.contrib.split_real_and_imaginary`` two real arrays for each complex leaf. What comes
    from neither is returned as it is.

    Args:
      average: the leaves that the optimizer averaged, by path.
      params: the parameters as the training has them.

    >>> flat = {Path(): jnp.array([1.0, 2.0, 3.0])}
    >>> found = as_the_parameters(flat, {"w": jnp.zeros(2), "b": jnp.zeros(())})
    >>> {str(path): leaf.tolist() for path, leaf in found.items()}
    {'b': 1.0, 'w': [2.0, 3.0]}
    """
    live = leaves(params)
    if _is_flat(average, live):
        return _unflattened(to_device(average[Path()]), live)
    return _joined(average, live)


def _is_flat(average: dict[Path, Any], live: dict[Path, Any]) -> bool:
    if average.keys() != {Path()}:
        return False
    shape = jnp.shape(average[Path()])
    other = live.keys() != {Path()} or jnp.shape(live[Path()]) != shape
    return other and shape == (sum(jnp.size(leaf) for leaf in live.values()),)


def _unflattened(vector: jax.Array, live: dict[Path, Any]) -> dict[Path, Any]:
    found, start = {}, 0
    for path, leaf in live.items():
        end = start + jnp.size(leaf)
        if is_averaged(leaf):  # in the vector there are the integers, too
            found[path] = jnp.reshape(vector[start:end], jnp.shape(leaf))
        start = end
    return found


def _joined(average: dict[Path, Any], live: dict[Path, Any]) -> dict[Path, Any]:
    found = dict(average)
    for path in live:
        real, imaginary = Path((*path, "real")), Path((*path, "imaginary"))
        if real in found and imaginary in found and path not in found:
            found[path] = lax.complex(to_device(found.pop(real)), to_device(found.pop(imaginary)))
    return found
