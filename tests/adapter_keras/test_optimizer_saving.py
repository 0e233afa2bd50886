"""A SWAOptimizer in files: resumed bit for bit, refused when it does not fit, and left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, dense, everything, fit, same, weights

import swa_core
from swa_core import EMA, StateError, StructureError, SWAConfig, SWAError, Uniform
from swa_keras import SWAOptimizer, SWASchedule

CONFIG = SWAConfig(start="3step", every="2step", rule=EMA(0.9))


def averaging(config=CONFIG, **arguments):
    return SWAOptimizer(keras.optimizers.Adam(0.01, **arguments), config)


def ordered(model, *callbacks, **arguments):
    return fit(model, *callbacks, shuffle=False, **arguments)


@pytest.fixture(scope="module")
def whole():
    model = dense(averaging(gradient_accumulation_steps=3))
    ordered(model)
    return model


def interrupted(epochs=2):
    model = dense(averaging(gradient_accumulation_steps=3))  # 8 batches: in the middle of an update
    ordered(model, epochs=epochs)
    return model


def as_whole(model, whole):
    same(everything(model), everything(whole))
    same(model.optimizer.averaged_weights, whole.optimizer.averaged_weights)
    assert model.optimizer.n_averaged == 2


def test_a_saved_model_goes_on_bit_for_bit(whole, tmp_path):
    saved = interrupted()
    saved.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(model.optimizer, SWAOptimizer)
    assert model.optimizer.get_config() == saved.optimizer.get_config()
    ordered(model, epochs=2)
    as_whole(model, whole)


def test_saved_weights_go_on_bit_for_bit(whole, tmp_path):
    interrupted().save_weights(tmp_path / "all.weights.h5")
    model = dense(averaging(gradient_accumulation_steps=3))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "all.weights.h5")
    ordered(model, epochs=2)
    as_whole(model, whole)


def test_backup_and_restore_goes_on_bit_for_bit(whole, tmp_path):
    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        ordered(dense(averaging(gradient_accumulation_steps=3)), backup(), Killed())
    model = dense(averaging(gradient_accumulation_steps=3))
    ordered(model, backup())
    as_whole(model, whole)


def test_loss_scaling_around_it_is_saved_too(tmp_path):
    def make():
        return dense(keras.optimizers.LossScaleOptimizer(averaging(), initial_scale=4.0))

    whole, model = make(), make()
    ordered(whole)
    ordered(model, epochs=2)
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    ordered(model, epochs=2)
    same(everything(model), everything(whole))


def test_the_state_tree_holds_it():
    model, other = interrupted(), dense(averaging(gradient_accumulation_steps=3))
    other.optimizer.build(other.trainable_variables)
    tree = model.get_state_tree(value_format="numpy_array")["optimizer_variables"]
    assert any("swa_average" in path for path in paths_of(tree))


def paths_of(tree, prefix=""):
    for name, value in tree.items():
        yield from (
            paths_of(value, f"{prefix}/{name}") if isinstance(value, dict) else [f"{prefix}/{name}"]
        )


def test_saving_reads_the_averages_once(tmp_path, monkeypatch):
    """Keras looks at every attribute of what it saves; ours copies all averages to the host."""
    model = interrupted()
    read = []
    arrays = type(model.optimizer.average).arrays
    monkeypatch.setattr(
        type(model.optimizer.average), "arrays", lambda self: read.append(1) or arrays(self)
    )
    model.save(tmp_path / "model.keras")
    assert len(read) == 1
    assert "averaged_weights" not in dir(model.optimizer)


def test_saved_inside_averaged_the_file_holds_the_average(tmp_path):
    model = dense(averaging())
    ordered(model)
    live = weights(model)
    with model.optimizer.averaged(model):
        model.save(tmp_path / "model.keras")
        state = model.optimizer.state_dict()
        held = weights(model)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    same(weights(loaded), held)
    same(loaded.optimizer.averaged_weights, model.optimizer.averaged_weights)
    loaded.optimizer.load_state_dict(state, loaded)
    same(weights(loaded), live)


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "all.weights.h5"
    model = dense(averaging())
    ordered(model)
    optimizer, before = model.optimizer, model.optimizer.averaged_weights
    saved = {}
    optimizer.save_own_variables(saved)

    def refused(kind, match, into=None, **changed):
        store = {k: v for k, v in (saved | changed).items() if v is not None}
        with pytest.raises(kind, match=match):
            (into or optimizer).load_own_variables(store)
        same(optimizer.averaged_weights, before)

    refused(StateError, "holds no average", swa=None)
    refused(StateError, "header cannot be read", swa=np.zeros(3, np.uint8))
    refused(StateError, "3 arrays for 4 weights", average_3=None)
    refused(StructureError, r"average holds \(4,\)", average_0=np.zeros(4, np.float32))
    other = dense(averaging(SWAConfig(start="3step", every="2step", rule=Uniform()))).optimizer
    refused(StateError, "made with rule", into=other)
    other = dense(averaging(SWAConfig(start="4step", every="2step", rule=EMA(0.9)))).optimizer
    refused(StateError, "made with schedule", into=other)
    refused(SWAError, "is not built", into=dense(averaging()).optimizer)
    # A file without an average, as Keras reports it.
    plain = dense(keras.optimizers.Adam(0.01))
    plain.optimizer.build(plain.trainable_variables)
    plain.save_weights(path)
    with pytest.raises(Exception, match="holds no average"):
        model.load_weights(path)
    bad = optimizer.state_dict()
    for match, state in {
        "counted epochs": bad | {"unit": "epoch"},
        "made with rule": bad | {"rule": "uniform"},
        "3 arrays for 4": bad | {"average": bad["average"][:3]},
        "version 99": bad | {"version": 99},
    }.items():
        with pytest.raises(StateError, match=match):
            optimizer.load_state_dict(state, model)
    same(optimizer.averaged_weights, before)


def test_before_the_first_snapshot_it_is_saved_as_empty(tmp_path):
    config = SWAConfig(start="6step", every="1step")
    whole, model = dense(averaging(config)), dense(averaging(config))
    ordered(whole, epochs=2)
    ordered(model, epochs=1)
    assert model.optimizer.state_dict()["average"] == []
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert (model.optimizer.updates, model.optimizer.n_averaged) == (4, 0)
    ordered(model, epochs=1)
    same(model.optimizer.averaged_weights, whole.optimizer.averaged_weights)
    same(everything(model), everything(whole))


# Without us


WITHOUT = """
    import sys
    import numpy as np

    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("swa_keras", "swa_core"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Nothing())
    import keras

    data = np.load(sys.argv[1])
    for path, kind in zip(sys.argv[2::2], sys.argv[3::2]):
        model = keras.models.load_model(path, compile=bool(kind))
        np.testing.assert_allclose(model.predict(data["x"], verbose=0), data["y"], rtol=1e-5)
        if kind:
            assert type(model.optimizer).__name__ == kind
            model.fit(data["x"], data["y"], verbose=0)
    assert not any(name.startswith("swa_") for name in sys.modules)
    print("loaded")
"""


def test_a_finalized_model_loads_where_swa_keras_is_not_installed(tmp_path):
    files, predicted = [], []
    loss_scaled = keras.optimizers.LossScaleOptimizer(averaging(), initial_scale=4.0)
    for number, (optimizer, kind) in enumerate(
        [(averaging(), "Adam"), (loss_scaled, "LossScaleOptimizer"), (averaging(), "")]
    ):
        model = dense(optimizer)
        ours = getattr(optimizer, "inner_optimizer", None) if number == 1 else optimizer
        ordered(model)
        ours.finalize(model)
        if kind:
            ours.unwrap(model)
            assert type(model.optimizer).__name__ == kind
            same(ours.averaged_weights, weights(model))  # which stays there
        path = str(tmp_path / f"{number}.keras")
        model.save(path)
        files += [path, kind]
        predicted.append(model.predict(X, verbose=0))
        if kind:
            fit(model, epochs=1)  # and it still trains
    np.savez(tmp_path / "data.npz", x=X, y=predicted[0])
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(WITHOUT),
            tmp_path / "data.npz",
            *files,
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip().endswith("loaded"), run.stderr


def test_unwrap_wants_its_own_model():
    optimizer = averaging()
    model = dense(averaging())
    with pytest.raises(SWAError, match=r"compiled with .*, and not with this optimizer"):
        optimizer.unwrap(model)


# Bad input


def test_bad_optimizers_are_refused():
    for inner, match in {
        "use_ema": (keras.optimizers.SGD(0.1, use_ema=True), "use_ema=True: Keras then overwrites"),
        "scaled": (
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
            r"the other way round: LossScaleOptimizer\(SWAOptimizer",
        ),
        "twice": (averaging(), r"add the callback SWA\(config\)"),
        "none": (None, "no optimizer to wrap"),
    }.values():
        with pytest.raises(SWAError, match=match):
            SWAOptimizer(inner, CONFIG)
    with pytest.raises(ValueError, match="Could not interpret optimizer"):
        SWAOptimizer(3, CONFIG)
    for config, match in ((SWAConfig(), "steps_per_epoch is needed"), ({"evry": 1}, "evry")):
        with pytest.raises(swa_core.ConfigError, match=match):
            SWAOptimizer("sgd", config)
    with pytest.raises(swa_core.ConfigError, match="later than the int32 counters reach"):
        SWAOptimizer("sgd", {"start": "3000000000step", "every": "1step"})


def test_other_variables_are_refused_with_their_path():
    optimizer = averaging()
    model = dense()
    with pytest.raises(SWAError, match="the optimizer is not built"):
        _ = optimizer.averaged_weights
    with pytest.raises(StructureError, match="no trainable floating-point weights"):
        optimizer.build([])
    variables = model.trainable_variables
    optimizer.build(variables)
    optimizer.build(variables)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="other")])
    kernel = other.trainable_variables[0]
    for refused in (
        lambda: optimizer.apply([keras.ops.ones(kernel.shape)], [kernel]),
        lambda: optimizer.build([kernel]),
    ):
        with pytest.raises(StructureError, match=r"variable '.*other/kernel'"):
            refused()
    with pytest.raises(StructureError, match="kernel' is missing"):
        optimizer.build(variables[1:])
    model.layers[0].trainable = False
    for _ in range(3):
        optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
    with pytest.raises(StructureError, match=r"leaf '.*kernel'"):
        optimizer.finalize(model)
    with pytest.raises(StateError, match="the values have shapes"):
        optimizer.set_weights([np.zeros(3)])


def test_a_layer_frozen_after_the_build_is_refused_by_jax_with_the_path():
    optimizer = averaging()
    model = dense(optimizer)
    fit(model, epochs=1)
    model.layers[0].trainable = False
    model.compile(optimizer, "mse")
    if keras.backend.backend() == "jax":
        # Keras' own optimizers fail here too, without saying which variable.
        with pytest.raises(StructureError, match=r"cannot update (variable|2 variables)"):
            fit(model, epochs=1)
        return
    # tensorflow and torch hand the optimizer what is left to train; the average has it all.
    fit(model, epochs=1)
    with pytest.raises(StructureError, match=r"leaf '.*kernel'"):
        optimizer.finalize(model)


def test_the_schedule_of_the_rate_is_saved_with_it(tmp_path):
    config = SWAConfig.of({"start": "3step", "every": "2step", "lr": {"value": 0.01}})
    optimizer = SWAOptimizer(keras.optimizers.SGD(SWASchedule(0.05, config)), config)
    model = dense(optimizer)
    ordered(model, epochs=1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert again.get_config() == optimizer.get_config()
    assert again.config == config
