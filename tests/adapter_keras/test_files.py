"""The callback's state as a file: a training goes on from it, and others read it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import safetensors.numpy
from adapter_keras.small_models import dense, fit, same, weights, with_batch_norm

from swa_core import (
    EMA,
    StateError,
    StructureError,
    SWAConfig,
    SWAState,
    load_average,
    save_average,
)
from swa_keras import SWA

CONFIG = SWAConfig(start="25%", every="1step", rule=EMA(0.7))


class StopAfter(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 == self.epoch


def test_a_training_goes_on_from_the_file_bit_for_bit(tmp_path):
    whole, reference = SWA(CONFIG), dense()
    fit(reference, whole, shuffle=False)
    model, swa = dense(), SWA(CONFIG, finalize=False)
    fit(model, swa, StopAfter(2), shuffle=False)
    swa.save(tmp_path / "swa.safetensors")
    resumed = SWA.load(tmp_path / "swa.safetensors", validate="raw")
    assert resumed.config == CONFIG
    fit(model, resumed, shuffle=False, initial_epoch=2)
    same(resumed.averaged_weights, whole.averaged_weights)
    same(weights(model), weights(reference))
    # Keras gives every model of a process other names.
    states = [swa.state_dict() | {"paths": None} for swa in (resumed, whole)]
    assert repr(states[0]) == repr(states[1])


def test_a_file_of_ones_own_goes_with_any_model_of_the_same_variables(tmp_path):
    swa = SWA(CONFIG, finalize=False)
    fit(dense(), swa)
    swa.save(tmp_path / "swa")
    model = dense()  # whose variables have other names
    SWA.load(tmp_path / "swa", model=model).finalize(model)
    same(weights(model), swa.averaged_weights)


def test_what_was_never_trained_comes_back_too(tmp_path):
    swa = SWA(CONFIG)
    swa.save(tmp_path / "empty")
    again = SWA.load(tmp_path / "empty")
    assert repr(again.state_dict()) == repr(swa.state_dict())
    model = dense()
    fit(model, again)
    assert again.n_averaged


def test_saved_inside_averaged_the_file_holds_the_training_weights_too(tmp_path):
    model, swa = with_batch_norm(), SWA(CONFIG, finalize=False, bn_data=np.ones((6, 4), "float32"))
    fit(model, swa)
    with swa.averaged():
        swapped = model.get_weights()
        swa.save(tmp_path / "swa")
    other = with_batch_norm()
    other.set_weights(swapped)
    bn_data = np.ones((6, 4), "float32")
    SWA.load(tmp_path / "swa", bn_data=bn_data).begin(other, steps_per_epoch=4, total_steps=16)
    for a, b in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_averages_lie_under_the_paths_of_the_variables(tmp_path):
    model, swa = dense(), SWA(CONFIG, finalize=False)
    fit(model, swa)
    swa.save(tmp_path / "swa")
    found = safetensors.numpy.load_file(tmp_path / "swa")
    assert [*sorted(found)] == sorted(v.path for v in model.trainable_variables)
    same([found[v.path] for v in model.trainable_variables], swa.averaged_weights)
    state = load_average(tmp_path / "swa").state
    assert (state.updates, state.n_averaged) == (16, 13)


def test_an_average_of_another_framework_goes_on_here(tmp_path):
    model = dense()
    kernel, bias, kernel_1, bias_1 = model.trainable_variables
    average = {
        "0.weight": np.full((5, 4), 1, "f4"),
        "0.bias": np.full(5, 2, "f4"),
        "1.weight": np.full((1, 5), 3, "f4"),
        "1.bias": np.full(1, 4, "f4"),
    }
    config = SWAConfig(start="8step", every="4step")
    state = SWAState(9, 1, 0, 1.0, average)
    save_average(tmp_path / "torch", state, config, framework="torch", schedule=(8, 4, None))
    # In any order.
    names = {bias_1.path: "1.bias", kernel.path: "0.weight"}
    names |= {kernel_1.path: "1.weight", bias.path: "0.bias"}
    transform = {v.path: np.transpose for v in (kernel, kernel_1)}
    swa = SWA.load(tmp_path / "torch", model=model, names=names, transform=transform)
    same(
        swa.averaged_weights,
        [np.full(v.shape, n + 1.0) for n, v in enumerate(model.trainable_variables)],
    )
    fit(model, swa, epochs=2)
    assert (swa.updates, swa.n_averaged) == (17, 3)
    with pytest.raises(StructureError, match=r"leaf '0\.bias' is missing"):
        SWA.load(tmp_path / "torch", model=model)
    with pytest.raises(StructureError, match="has shape"):
        SWA.load(tmp_path / "torch", model=model, names=names)
    with pytest.raises(TypeError, match="model="):
        SWA.load(tmp_path / "torch", names=names)
    counts = {"1.bias": (0, 0.0)}
    save_average(tmp_path / "counts", state, config, counts=counts)
    with pytest.raises(StructureError, match="joined it later"):
        SWA.load(tmp_path / "counts", model=model, names=names, transform=transform)


def test_a_file_of_somebody_else_is_refused(tmp_path):
    save_average(tmp_path / "torch", SWAState(0, 0, 0, 0.0, {}), CONFIG, framework="torch")
    with pytest.raises(StateError, match="torch holds an average that torch saved"):
        SWA.load(tmp_path / "torch")
    swa = SWA(CONFIG, finalize=False)
    fit(dense(), swa)
    saved = swa.state_dict()
    paths = [*saved["paths"][:-1], "gone"]
    average = dict(zip(saved["paths"], saved["average"], strict=True))
    extra = {"unit": "update", "epochs": 4, "base_rate": None, "live": None, "paths": paths}
    state = SWAState(16, 13, 0, 2.0, average)
    save_average(tmp_path / "bad", state, CONFIG, framework="keras", extra=extra)
    with pytest.raises(StateError, match="bad is damaged: the array 'gone' is missing"):
        SWA.load(tmp_path / "bad")
