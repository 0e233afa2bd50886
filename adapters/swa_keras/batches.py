"""The inputs of a model, batch by batch, from whatever ``fit`` takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from swa_core import BatchNormError

_INFINITE = -1  # tf.data's cardinality of a dataset that repeats for ever


def inputs_of(data: Any, batch_size: int = 32) -> Iterator[Any]:
    """The inputs x of every batch, as tensors of the backend.

    Args:
      data: an array; a tuple (x, y) or (x, y, sample_weight) of arrays or of dicts and lists of
        arrays; a dict of arrays; or anything that yields batches of these forms: a
        tf.data.Dataset, a PyDataset, a torch DataLoader, a generator, a list of batches.
      batch_size: for arrays, which are cut into batches.

    Raises:
      BatchNormError: data without an end.
      TypeError: nothing of these.

    >>> [x.shape[0] for x in inputs_of(np.zeros((5, 3)), batch_size=2)]
    [2, 2, 1]
    """
    for batch in _batches(data, batch_size):
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        if isinstance(x, list) and len(x) == 1:
            x = x[0]
        yield keras.tree.map_structure(_tensor, x)


def _batches(data: Any, batch_size: int) -> Iterable[Any]:
    if _is_array(data) or (isinstance(data, dict) and _all_arrays(data)):
        return _cut(data, batch_size)
    if isinstance(data, tuple) and data and _all_arrays(data):
        return _cut(keras.utils.unpack_x_y_sample_weight(data)[0], batch_size)
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise _endless("a PyDataset without num_batches")
        return (data[number] for number in range(data.num_batches))
    if hasattr(data, "cardinality") and int(data.cardinality()) == _INFINITE:
        raise _endless("a dataset that repeats for ever")
    if not isinstance(data, Iterable):
        raise TypeError(f"expected arrays or batches, as fit takes them, got {type(data).__name__}")
    return data


def _endless(what: str) -> BatchNormError:
    return BatchNormError(
        f"{what} has no end, so its statistics cannot be pooled.",
        hint="pass a dataset of one epoch, e.g. dataset.take(steps).",
    )


def _cut(x: Any, batch_size: int) -> Iterator[Any]:
    number = keras.tree.flatten(x)[0].shape[0]
    for begin in range(0, number, batch_size):
        # A tuple of one, so that a list of several inputs is not taken for (x, y).
        yield (keras.tree.map_structure(lambda a, b=begin: a[b : b + batch_size], x),)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _all_arrays(value: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(value) if leaf is not None]
    return bool(leaves) and all(map(_is_array, leaves))


def _tensor(leaf: Any) -> Any:
    if keras.ops.is_tensor(leaf):
        return leaf
    # Tensors of another framework (tf.data on jax, a torch DataLoader on tensorflow).
    array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    return array if array.dtype.kind in "OSU" else keras.ops.convert_to_tensor(array)
