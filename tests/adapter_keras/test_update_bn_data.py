"""update_bn on every kind of data: workers, streams without an end, what reading leaves behind."""

from __future__ import annotations

import itertools
import random
import threading

import keras
import numpy as np
import pandas
import pytest
import scipy.sparse
from adapter_keras.small_models import X, Y, array, stream, with_batch_norm

from swa_core import BatchNormError, ConfigError, SWAWarning
from swa_keras import SWA, update_bn

EXACT = X.astype("float64")


def one_layer():
    layer = keras.layers.BatchNormalization()
    return keras.Sequential([keras.Input((4,)), layer]), layer


def check(layer, data=EXACT):
    np.testing.assert_allclose(array(layer.moving_mean), data.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), data.var(0), rtol=1e-6)


class Rows(keras.utils.PyDataset):
    """Batches of 6; counts the ends of epochs, where a dataset would shuffle."""

    epochs = 0

    def __init__(self, number=4, broken_at=None, **workers):
        super().__init__(**workers)
        self.readers = set()
        self.number, self.broken_at = number, broken_at

    @property
    def num_batches(self):
        return self.number

    def __getitem__(self, place):
        self.readers.add(threading.current_thread())
        if place == self.broken_at:
            raise OSError("disk")
        begin = 6 * (place % 4)
        return X[begin : begin + 6], Y[begin : begin + 6]

    def on_epoch_end(self):
        self.epochs += 1


@pytest.mark.parametrize("workers", [{"workers": 2, "max_queue_size": 2}, {}], ids=str)
def test_a_py_dataset_is_read_by_its_workers_and_its_epoch_does_not_end(workers):
    model, layer = one_layer()
    data = Rows(**workers)
    for _ in range(2):
        update_bn(model, data, verbose=0)
        check(layer)
    assert data.epochs == 0
    assert (threading.main_thread() in data.readers) == (not workers)


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="to fork a process beside jax's or tensorflow's threads is Keras' own risk",
)
def test_a_py_dataset_with_processes():
    model, layer = one_layer()
    update_bn(model, Rows(workers=1, use_multiprocessing=True), verbose=0)
    check(layer)


def test_an_error_in_a_worker_reaches_the_caller_and_no_worker_stays():
    model, layer = one_layer()
    with pytest.raises(OSError, match="disk"):
        update_bn(model, Rows(workers=2, broken_at=2), verbose=0)
    with pytest.raises(ValueError, match="stop"):
        update_bn(model, Rows(number=None, workers=2), forward=refuse, steps=9, verbose=0)
    assert not [t for t in threading.enumerate() if t.name.startswith("Worker_")]
    check(layer, np.float64([[-1.0] * 4, [1.0] * 4]))


def refuse(model, batch):
    raise ValueError("stop")


def endless():
    return ((X[n : n + 6], Y[n : n + 6]) for n in itertools.cycle(range(0, 24, 6)))


ENDLESS = {
    "generator": endless,
    "function": lambda: endless,
    "PyDataset": lambda: Rows(number=None),
    "PyDataset with workers": lambda: Rows(number=None, workers=2),
    "dataset or loader": lambda: stream(steps=400),
    "arrays": lambda: (np.tile(X, (3, 1)), np.tile(Y, (3, 1))),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_steps_of_data_that_goes_on(kind):
    model, layer = one_layer()
    update_bn(model, ENDLESS[kind](), steps=4, batch_size=6, verbose=0)
    check(layer)


def test_a_generator_is_read_no_further_than_the_steps():
    model, layer = one_layer()
    data = endless()
    update_bn(model, data, steps=2, verbose=0)
    check(layer, EXACT[:12])
    np.testing.assert_array_equal(next(data)[0], X[12:18])


def test_data_without_an_end_needs_steps():
    model, _ = one_layer()
    with pytest.raises(BatchNormError, match=r"no end(.|\n)*steps=") as error:
        update_bn(model, Rows(number=None))
    assert "take(steps)" in str(error.value)


def test_data_that_ends_before_the_steps_says_so():
    model, layer = one_layer()
    with pytest.warns(SWAWarning, match="ran out after 4 of 9 steps"):
        update_bn(model, X, steps=9, batch_size=6, verbose=0)
    check(layer)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 2.5}, {"verbose": 3}], ids=str)
def test_bad_arguments(wrong):
    model, layer = one_layer()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        update_bn(model, X, **wrong)
    assert not array(layer.moving_mean).any()


def test_a_list_of_arrays_is_the_inputs_of_a_model_that_has_as_many():
    inputs = [keras.Input((4,)), keras.Input((1,))]
    layer = keras.layers.BatchNormalization()
    model = keras.Model(inputs, layer(keras.layers.Concatenate()(inputs)))
    update_bn(model, [X, Y], batch_size=7, verbose=0)
    check(layer, np.concatenate([X, Y], axis=1).astype("float64"))


def test_a_dict_in_batches_of_a_dataset():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((1,), name="b")}
    layer = keras.layers.BatchNormalization()
    model = keras.Model(inputs, layer(keras.layers.Concatenate()([inputs["a"], inputs["b"]])))
    batches = [({"a": X[n : n + 5], "b": Y[n : n + 5]}, Y[n : n + 5]) for n in range(0, 24, 5)]
    update_bn(model, batches, verbose=0)
    check(layer, np.concatenate([X, Y], axis=1).astype("float64"))


def test_a_data_frame_and_a_sparse_matrix():
    model, layer = one_layer()
    update_bn(model, scipy.sparse.coo_array(X), batch_size=7, verbose=0)
    check(layer)
    model, layer = one_layer()
    frame = pandas.DataFrame(X, index=np.linspace(0, 50, 24), columns=[*"abcd"])
    update_bn(model, (frame, pandas.Series(Y[:, 0])), batch_size=7, verbose=0)
    check(layer)


def test_sample_weights_do_not_weigh():
    model, layer = one_layer()
    update_bn(model, (X, Y, np.arange(24.0)), batch_size=6, verbose=0)
    check(layer)


class Augmented(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, place):
        noise = random.random() + np.random.rand()
        return X[6 * place : 6 * place + 6] + noise, Y[6 * place : 6 * place + 6]


def test_random_numbers_go_on_as_if_nothing_had_been_read():
    torch = pytest.importorskip("torch")
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    own = torch.Generator().manual_seed(1)
    shuffled = torch.utils.data.DataLoader(rows, batch_size=6, shuffle=True)
    by_itself = torch.utils.data.DataLoader(rows, batch_size=6, shuffle=True, generator=own)
    for data in (Augmented(), shuffled, by_itself):
        model, _ = one_layer()
        drawn = []
        for reads in (False, True):
            keras.utils.set_random_seed(3)
            torch.manual_seed(3)
            own.manual_seed(3)
            if reads:
                update_bn(model, data, verbose=0)
            drawn.append((random.random(), np.random.rand(), torch.rand(()), own.get_state()))
        for a, b in zip(*drawn, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_bar_is_keras_own(capsys):
    model, _ = one_layer()
    update_bn(model, X, batch_size=6)
    assert "4/4" in capsys.readouterr().out
    update_bn(model, endless(), steps=3)
    assert "3/3" in capsys.readouterr().out
    update_bn(model, stream(), verbose=1)  # whose length only its end tells
    shown = capsys.readouterr().out
    assert "4/Unknown" in shown
    assert shown.endswith("\n")
    update_bn(model, X, batch_size=6, verbose=2)
    assert capsys.readouterr().out.count("\n") == 1
    update_bn(model, X, batch_size=6, verbose=0)
    assert not capsys.readouterr().out


def test_the_callback_shows_no_bar_of_its_own(capsys):
    model = with_batch_norm()
    swa = SWA({"start": "1ep"}, bn_data=(X, Y))
    model.fit(X, Y, batch_size=6, validation_data=(X, Y), verbose=0, callbacks=[swa])
    swa.finalize(bn_data=X)
    assert not capsys.readouterr().out


def test_bn_data_of_a_callback_is_looked_at_before_the_training():
    with pytest.raises(ConfigError, match="without num_batches has no end"):
        SWA({}, bn_data=Rows(number=None))
    with pytest.raises(ConfigError, match=r"bn_data: expected arrays or batches.*got int"):
        SWA({}, bn_data=3)
    with pytest.raises(ConfigError, match="a function that returns the generator"):
        SWA({}, bn_data=endless())


def test_bn_data_may_be_a_function_that_returns_a_generator():
    model = with_batch_norm()
    calls = []

    def batches():
        calls.append(None)
        return itertools.islice(endless(), 4)

    swa = SWA({"start": "1ep", "every": "1ep"}, bn_data=batches)
    model.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[swa])
    assert len(calls) == 2  # once for each average, and the last again for the end
