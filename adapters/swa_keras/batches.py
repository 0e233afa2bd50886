"""Data batch by batch, from whatever ``fit`` takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from numbers import Integral
from typing import Any, Literal

import keras
import numpy as np

from swa_core import BatchNormError
from swa_keras.backend import current

Verbose = Literal["auto", 0, 1, 2]

_INFINITE = -1  # tf.data's cardinality of a dataset that repeats for ever


def batches_of(
    data: Any, *, batch_size: int = 32, steps: int | None = None, n_inputs: int = 1
) -> tuple[Iterator[Any], int | None]:
    """The batches of the data, once, and how many there are.

    Args:
      data: an array (also a DataFrame or a sparse matrix); a tuple (x, y) or (x, y, sample_weight)
        of arrays or of dicts and lists of arrays; a dict of arrays; or anything that yields
        batches of these forms: a tf.data.Dataset, a PyDataset, a torch DataLoader, a generator, a
        list of batches; or a function without arguments that returns one of all these.
      batch_size: for arrays, which are cut into batches.
      steps: read so many batches and no more; needed for data without an end.
      n_inputs: of the model. If there are several, a list of as many arrays is one x for all of
        them, as in ``fit``; else a list is one of batches.

    Returns:
      An iterator over batches, tuples where the data was arrays; and their number, None if only
      reading can tell.

    Raises:
      BatchNormError: data without an end and no ``steps``.
      TypeError, ValueError: nothing of these; steps or a batch size that is no number above 0.

    >>> batches, number = batches_of(np.zeros((5, 3)), batch_size=2)
    >>> number, [x.shape[0] for (x,) in batches]
    (3, [2, 2, 1])
    """
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is a number of at least 1, got {value!r}")
    if callable(data) and not isinstance(data, Iterable):
        data = data()
    number: int | None
    if (arrays := _arrays(data, n_inputs)) is not None:
        number = math.ceil(_length(arrays) / batch_size)
        batches = _cut(arrays, batch_size)
    elif isinstance(data, keras.utils.PyDataset):
        number = _limit(data.num_batches, steps, "a PyDataset without num_batches")
        batches = _of_py_dataset(data, number)
    elif hasattr(data, "cardinality"):
        cardinality = int(data.cardinality())
        endless = cardinality == _INFINITE
        if endless:
            _limit(None, steps, "a dataset that repeats for ever")
        number = None if cardinality < 0 else cardinality
        batches = _read(data)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        number = _known_length(data)
        batches = _read(data)
    else:
        raise TypeError(f"expected arrays or batches, as fit takes them, got {type(data).__name__}")
    if steps is not None:
        # islice takes no batch more than it gives, so a generator can be read on from there.
        batches = islice(batches, steps)
        number = steps if number is None else min(number, steps)
    return batches, number


def fault_of(data: Any) -> str | None:
    """What is wrong with data that is to be read at every validation, without reading it."""
    if hasattr(data, "__next__"):
        return (
            "a generator can be read only once, and every validation reads the data. Pass arrays, "
            "a dataset, a function that returns the generator, or list(...) of it."
        )
    if callable(data) and not isinstance(data, Iterable):
        return None
    try:
        batches_of(data)
    except (BatchNormError, TypeError) as error:
        return str(error)
    return None


def x_of(batch: Any) -> Any:
    """The inputs of a batch (x, y, sample_weight), as tensors of the backend.

    >>> x_of((np.zeros((2, 3)), np.zeros(2))).shape[0]
    2
    """
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    if isinstance(x, list) and len(x) == 1:
        x = x[0]
    return tensors_of(x)


def tensors_of(batch: Any) -> Any:
    """The same structure with tensors of the backend in it."""
    return keras.tree.map_structure(_tensor, batch)


def with_bar(batches: Iterator[Any], number: int | None, verbose: Verbose) -> Iterator[Any]:
    """The batches, with Keras' progress bar while they are used.

    Args:
      batches: what to go through.
      number: how many, if known.
      verbose: 0 is silent, 1 a bar, 2 one line at the end; "auto" is 1, as in ``fit``.

    Raises:
      ValueError: another ``verbose``.
    """
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'verbose is "auto", 0, 1 or 2, got {verbose!r}')
    bar = keras.utils.Progbar(number, verbose=1 if verbose == "auto" else int(verbose))
    seen = 0
    for seen, batch in enumerate(batches, 1):
        yield batch
        bar.update(seen)  # draws the end of the line by itself at the expected number
    if seen and seen != number:
        bar.update(seen, finalize=True)


def _read(data: Iterable[Any]) -> Iterator[Any]:
    # Nothing is started before the first batch is asked for; and not "yield from", which would
    # close a generator that the user goes on reading.
    for batch in data:  # noqa: UP028
        yield batch


def _limit(number: int | None, steps: int | None, what: str) -> int:
    """The number of batches to read of data that may have no end."""
    if number is None and steps is None:
        raise BatchNormError(
            f"{what} has no end, so its statistics cannot be pooled.",
            hint="say how many batches to take: update_bn(..., steps=...), or a dataset of one "
            "epoch, e.g. dataset.take(steps).",
        )
    return min(n for n in (number, steps) if n is not None)


def _known_length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # also what a DataLoader of a stream says
        return None


def _of_py_dataset(data: keras.utils.PyDataset, number: int) -> Iterator[Any]:
    """Its batches in order, read ahead by its workers if it has any.

    ``on_epoch_begin`` and ``on_epoch_end`` are not called: a dataset that shuffles there would
    give the training another order than without us.
    """
    if data.workers <= 1 and not (data.workers and data.use_multiprocessing):
        yield from (data[place] for place in range(number))
        return
    # Keras' own, so that threads and processes are what the dataset was written for.
    from keras.src.trainers.data_adapters.py_dataset_adapter import OrderedEnqueuer

    ahead = OrderedEnqueuer(
        data,
        workers=data.workers,
        use_multiprocessing=data.use_multiprocessing,
        max_queue_size=data.max_queue_size,
    )
    ahead.start()
    try:
        if number:
            yield from islice(ahead.get(), number)
    finally:
        ahead.stop()


def _arrays(data: Any, n_inputs: int) -> tuple[Any, ...] | None:
    """The data as (x,), (x, y) or (x, y, sample_weight), if it is arrays."""
    if (
        _is_array(data)
        or (isinstance(data, dict) and _all_arrays(data))
        or (
            isinstance(data, list) and 1 < n_inputs == len(data) and all(_is_array(x) for x in data)
        )
    ):
        data = (data,)
    elif not isinstance(data, tuple) or not data or not _all_arrays(data):
        return None
    return keras.tree.map_structure(_sliceable, data)


def _length(arrays: Any) -> int:
    return int(keras.tree.flatten(arrays[0])[0].shape[0])


def _cut(arrays: tuple[Any, ...], batch_size: int) -> Iterator[tuple[Any, ...]]:
    for begin in range(0, _length(arrays), batch_size):
        yield keras.tree.map_structure(
            lambda array, b=begin: None if array is None else array[b : b + batch_size], arrays
        )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and (hasattr(value, "dtype") or hasattr(value, "dtypes"))


def _all_arrays(value: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(value) if leaf is not None]
    return bool(leaves) and all(map(_is_array, leaves))


def _sliceable(array: Any) -> Any:
    """What can be cut into rows, as DataFrames and sparse matrices cannot as they are."""
    if hasattr(array, "to_numpy"):
        return array.to_numpy()
    return array.tocsr() if hasattr(array, "tocsr") else array


def _tensor(leaf: Any) -> Any:
    if leaf is None:
        return leaf
    if keras.ops.is_tensor(leaf):
        return current().batch(leaf)
    if hasattr(leaf, "toarray"):
        leaf = leaf.toarray()
    # Tensors of another framework (tf.data on jax, a torch DataLoader on tensorflow).
    array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    return array if array.dtype.kind in "OSU" else current().batch(array)
