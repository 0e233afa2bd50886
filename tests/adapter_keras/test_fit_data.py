"""Every kind of data that ``fit`` takes: the same clock, and the average of the same updates."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    STEPS,
    Updates,
    X,
    Y,
    averages,
    dense,
    everything,
    fit,
    same,
    stream,
)

from swa_core import ConfigError, Schedule
from swa_keras import SWA

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")


def batches(number=STEPS):
    """Batches of 6, from the beginning again where the data ends."""
    for n in range(number):
        begin = 6 * (n % STEPS)
        yield X[begin : begin + 6], Y[begin : begin + 6]


class Known(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return X[6 * index : 6 * index + 6], Y[6 * index : 6 * index + 6]


class Endless(Known):
    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return super().__getitem__(index % STEPS)


def tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(6)


def tf_data_of_unknown_length():
    return tf_data().filter(lambda x, y: True)


def torch_loader():
    import torch

    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(data, batch_size=6)


def torch_loader_of_unknown_length():
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return batches()

    return torch.utils.data.DataLoader(Stream(), batch_size=None)


KNOWN = {
    "arrays": {"x": X, "y": Y, "batch_size": 6},
    "a ragged last batch": {"x": X[:-2], "y": Y[:-2], "batch_size": 6},
    "tensors": {"x": keras.ops.convert_to_tensor(X), "y": Y, "batch_size": 6},
    "tf.data": tf_data,
    "PyDataset": Known,
    "torch loader": torch_loader,
    "endless PyDataset": lambda: {"x": Endless(), "steps_per_epoch": STEPS},
    "generator": lambda: {"x": batches(99), "steps_per_epoch": STEPS},
    "tf.data of unknown length": lambda: {
        "x": tf_data_of_unknown_length().repeat(),
        "steps_per_epoch": STEPS,
    },
}
UNKNOWN = {
    "tf.data": tf_data_of_unknown_length,
    "torch loader": torch_loader_of_unknown_length,
}


def train(model, data, *callbacks, **arguments):
    data = data() if callable(data) else data
    data = data if isinstance(data, dict) else {"x": data}
    keras.utils.set_random_seed(8)
    arguments = {"epochs": 4, "verbose": 0, "shuffle": False, **data, **arguments}
    return model.fit(callbacks=list(callbacks), **arguments)


def several(*times):
    """Callbacks with these starts and distances, which do not touch the training."""
    return [
        SWA({"start": start, "every": every}, validate="raw", finalize=False)
        for start, every in times
    ]


@pytest.mark.parametrize("data", KNOWN.values(), ids=KNOWN)
def test_data_of_known_length(data):
    updates, swas = Updates(), several(("50%", "1ep"), ("5step", "3step"))
    train(dense(), data, updates, *swas)
    assert len(updates.after) == 4 * STEPS
    assert [swa.schedule for swa in swas] == [Schedule(8, 4), Schedule(5, 3)]
    for swa in swas:
        assert swa.updates == 4 * STEPS
        averages(swa, updates.after)


@pytest.mark.parametrize("data", UNKNOWN.values(), ids=UNKNOWN)
def test_data_of_unknown_length(data):
    updates, swas = Updates(), several(("50%", "1ep"), ("25%", "50%"), ("5step", "3step"))
    train(dense(), data, updates, *swas)
    assert len(updates.after) == 4 * STEPS
    assert [swa.schedule for swa in swas] == [Schedule(2, 1), Schedule(1, 2), Schedule(5, 3)]
    for swa, schedule in zip(swas, [(8, 4), (4, 8), (5, 3)], strict=True):
        assert swa.updates == 4 * STEPS
        averages(swa, updates.after, Schedule(*schedule))


def test_a_generator_that_ends():
    updates, swa = Updates(), SWA({"start": "2step", "every": "2step"}, finalize=False)
    train(dense(), {"x": batches(7)}, updates, swa, epochs=1)
    assert len(updates.after) == swa.updates == 7
    averages(swa, updates.after)


@pytest.mark.parametrize(
    ("data", "steps", "accumulation"),
    [
        (lambda: stream(3), None, 2),
        (lambda: stream(3), 5, 2),
        (lambda: batches(7), 4, None),
        (lambda: {"x": X, "y": Y, "batch_size": 6}, 6, None),
        (lambda: stream(12), 4, None),
        (lambda: {"x": X, "y": Y, "batch_size": 6}, 3, 2),
    ],
    ids=[
        "no whole number of updates",
        "runs out in every epoch",
        "runs out for good",
        "arrays run out",
        "spans epochs",
        "arrays span epochs",
    ],
)
def test_epochs_and_data_of_different_lengths(data, steps, accumulation):
    # On tensorflow the optimizer's counter moves before an iterator is found empty.
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulation)
    updates, swa = Updates(), SWA({"start": "2step", "every": "2step"}, finalize=False)
    model = dense(optimizer)
    train(model, data, updates, swa, epochs=3, steps_per_epoch=steps)
    assert len(updates.after) == swa.updates
    train(model, data, updates, swa, epochs=2, steps_per_epoch=steps)
    assert len(updates.after) == swa.updates
    averages(swa, updates.after)


def test_weights_of_classes_and_samples_leave_the_clock_alone():
    labels = (Y > 0).astype("float32")
    weighted = {"x": X, "y": labels, "batch_size": 6}
    for extra in ({"class_weight": {0: 0.5, 1: 2.0}}, {"sample_weight": np.arange(24.0)}):
        plain, model, updates = dense(), dense(), Updates()
        swa = SWA({"start": "50%", "every": "1step"}, finalize=False)
        train(plain, weighted | extra)
        train(model, weighted | extra, updates, swa)
        same(everything(model), everything(plain))
        assert swa.n_averaged == 9
        averages(swa, updates.after)


def test_a_part_of_the_data_for_validation_shortens_the_epochs():
    updates, swa = Updates(), SWA({"start": "50%", "every": "1ep"}, finalize=False)
    history = train(dense(), KNOWN["arrays"], updates, swa, validation_split=0.25)
    assert swa.schedule == Schedule(6, 3)
    assert "val_swa_loss" in history.history
    averages(swa, updates.after)


def test_every_fault_of_a_mix_that_cannot_be_resolved_is_named():
    swa = SWA({"start": "30%", "every": "10step", "stop": "1.5ep", "lr": {"value": 0.1}})
    with pytest.raises(ConfigError) as caught:
        fit(dense(), swa, data=stream())
    assert [fault.path for fault in caught.value.faults] == ["swa.start", "swa.every", "swa.stop"]
    assert "Give fit steps_per_epoch" in str(caught.value)


@pytest.mark.parametrize("first", ["known", "unknown"])
def test_the_clock_of_the_first_fit_is_kept_where_a_later_one_knows_more_or_less(first):
    known, unknown = KNOWN["arrays"], {"x": stream()}
    data = (known, unknown) if first == "known" else (unknown, known)
    updates, swa = Updates(), SWA({"start": "50%", "every": "1ep"}, finalize=False)
    model = dense()
    train(model, data[0], updates, swa)
    with pytest.warns(UserWarning, match="goes on by the schedule of the first"):
        train(model, data[1], updates, swa)
    assert swa.schedule == (Schedule(8, 4) if first == "known" else Schedule(2, 1))
    averages(swa, updates.after, Schedule(8, 4))


def test_initial_epoch_where_it_cannot_be_counted_is_refused():
    model = dense()
    swa = SWA({"start": "5step", "every": "3step"})
    with pytest.raises(ConfigError, match="initial_epoch: 2 epochs are done, but how many"):
        fit(model, swa, data=stream(), initial_epoch=2)
    updates, swa = Updates(), SWA({"start": "3ep", "every": "1ep"}, finalize=False)
    fit(model, updates, swa, data=stream(), initial_epoch=2, epochs=5)
    averages(swa, updates.after, Schedule(4, 4))
