"""``swa.checkpoint``: files that hold the average, the best by its own metric."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    X,
    Y,
    dense,
    everything,
    fit,
    same,
    stream,
    weights,
    with_batch_norm,
)

from swa_core import ConfigError, SWAWarning
from swa_keras import SWA

EVERY_EPOCH = {"start": "1ep", "every": "1ep"}
FROM_SECOND = {"start": "2ep", "every": "1ep"}


class Averages(keras.callbacks.Callback):
    """The average at each epoch's end, and the logs."""

    def __init__(self, swa):
        super().__init__()
        self.swa, self.average, self.logs = swa, [], []

    def on_epoch_end(self, epoch, logs=None):
        self.average.append(self.swa.averaged_weights if self.swa.n_averaged else None)
        self.logs.append(dict(logs))


def loaded(path):
    return keras.models.load_model(path)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("unknown", [True, False], ids=["epochs", "updates"])
def test_every_epoch_holds_the_average_of_that_epoch(first, unknown, tmp_path):
    plain, model = dense(), dense()
    data = {"data": stream()} if unknown else {}
    fit(plain, epochs=3, validation_data=(X, Y), **data)
    swa = SWA(EVERY_EPOCH, finalize=False)
    saving, kept = swa.checkpoint(tmp_path / "{epoch}.keras"), Averages(swa)
    callbacks = [swa, saving] if first else [saving, swa]
    fit(model, *callbacks, kept, epochs=3, validation_data=(X, Y), **data)
    for epoch in range(3):
        same(weights(loaded(tmp_path / f"{epoch + 1}.keras")), kept.average[epoch])
    same(everything(model), everything(plain))  # the training went on as if nothing had been saved


def test_the_best_by_the_averages_own_metric(tmp_path):
    swa = SWA(EVERY_EPOCH)
    saving, kept = swa.checkpoint(tmp_path / "best.keras", save_best_only=True), Averages(swa)
    assert isinstance(saving, keras.callbacks.ModelCheckpoint)
    model = dense(keras.optimizers.SGD(0.4, momentum=0.9))  # so fast that it gets worse again
    fit(model, saving, swa, kept, epochs=6, validation_data=(X, Y))
    losses = [logs["val_swa_loss"] for logs in kept.logs]
    best = int(np.argmin(losses))
    assert best != 5
    assert saving.best == losses[best]
    found = loaded(tmp_path / "best.keras")
    same(weights(found), kept.average[best])
    assert found.evaluate(X, Y, verbose=0)[0] == pytest.approx(losses[best], rel=1e-5)


def test_which_way_is_better_is_found_as_keras_finds_it(tmp_path):
    def direction(monitor, model, **arguments):
        swa = SWA(EVERY_EPOCH)
        saving = swa.checkpoint(tmp_path / "x.keras", monitor, save_best_only=True, **arguments)
        fit(model, swa, saving, epochs=1, validation_data=(X, (Y > 0).astype("float32")))
        assert saving.monitor == monitor
        return saving.monitor_op

    model = dense()
    model.compile("sgd", "mse", metrics=["mae", keras.metrics.AUC(name="auc")])
    assert direction("val_swa_loss", model) is keras.ops.less
    assert direction("val_swa_mae", model) is keras.ops.less
    assert direction("val_swa_auc", model) is keras.ops.greater
    assert direction("val_swa_auc", model, mode="min") is keras.ops.less
    with pytest.raises(ValueError, match="isn't able to automatically"):
        direction("val_swa_nonsense", model)


def test_weights_alone(tmp_path):
    swa = SWA(EVERY_EPOCH)
    model, path = dense(), tmp_path / "{epoch}-{val_swa_loss:.3f}.weights.h5"
    saving = swa.checkpoint(path, save_weights_only=True)
    fit(model, swa, saving, epochs=2, validation_data=(X, Y))
    (last,) = tmp_path.glob("2-*")
    other = dense()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(last)
    same(weights(other), swa.averaged_weights)


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_every_so_many_batches(first, tmp_path):
    swa = SWA({"start": "1step", "every": "1step"}, finalize=False)
    saving = swa.checkpoint(tmp_path / "{epoch}-{batch}.keras", save_freq=3, save_best_only=False)
    averages = {}

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            averages[batch] = swa.averaged_weights

    fit(dense(), *([swa, saving] if first else [saving, swa]), After(), epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1-3.keras"]
    same(weights(loaded(tmp_path / "1-3.keras")), averages[2])
    assert swa.n_averaged == 4


def test_the_best_of_so_many_batches_by_the_training_loss(tmp_path):
    swa = SWA({"start": "1step", "every": "1step"})
    path = tmp_path / "best.keras"
    saving = swa.checkpoint(path, "loss", save_freq=1, save_best_only=True)
    fit(dense(), swa, saving, epochs=1)
    assert path.exists()


def test_before_the_first_snapshot_nothing_is_saved_and_nothing_is_best(tmp_path, capsys):
    swa = SWA(FROM_SECOND)
    kept = Averages(swa)
    saving = swa.checkpoint(tmp_path / "{epoch}.keras", save_best_only=True, verbose=1)
    # The training weights of the first epoch have the best loss by far.
    first = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(val_swa_loss=0.0) if not epoch else None
    )
    fit(dense(), first, swa, saving, kept, epochs=2, validation_data=(X, Y))
    assert "Epoch 1: not saving an average: there is no snapshot yet" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["2.keras"]
    assert saving.best == kept.logs[1]["val_swa_loss"]


def test_a_training_in_which_nothing_was_saved_ends_with_a_warning(tmp_path):
    swa = SWA({"start": "3ep"}, finalize=False)
    saving = swa.checkpoint(tmp_path / "x.keras")
    model = dense()
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    with pytest.warns(SWAWarning, match=r"nothing was saved to .*there is no snapshot yet"):
        fit(model, swa, saving, stop)
    assert not list(tmp_path.iterdir())


def test_epochs_without_validation_are_left_out_of_the_best(tmp_path):
    swa = SWA(EVERY_EPOCH)
    kept, saving = Averages(swa), swa.checkpoint(tmp_path / "{epoch}.keras", save_best_only=True)
    with pytest.warns(SWAWarning, match="epoch 1 was not validated") as caught:
        fit(dense(), swa, saving, kept, validation_data=(X, Y), validation_freq=2)
    assert sum(issubclass(w.category, SWAWarning) for w in caught) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"2.keras", "4.keras"}
    assert (tmp_path / "2.keras").exists()


def test_a_metric_that_is_not_the_averages_is_refused(tmp_path):
    for validate, monitor, message in (
        ("raw", None, r'Pass SWA\(..., validate="both"\)'),
        ("raw", "val_loss", r'Pass SWA\(..., validate="both"\)'),
        ("average", "val_swa_mae", "Say monitor='val_mae'"),
    ):
        swa = SWA(EVERY_EPOCH, validate=validate)
        with pytest.raises(ConfigError, match=message):
            swa.checkpoint(tmp_path / "x.keras", monitor, save_best_only=True)
        swa.checkpoint(tmp_path / "x.keras", monitor)  # where nothing is compared
    assert SWA({}, validate="average").checkpoint("x.keras").monitor == "val_loss"
    assert SWA({}).checkpoint("x.keras").monitor == "val_swa_loss"
    with pytest.raises(ValueError, match="must end in"):
        SWA({}).checkpoint("x.txt")


def test_without_validation_every_average_is_saved(tmp_path):
    swa = SWA(EVERY_EPOCH)
    fit(dense(), swa, swa.checkpoint(tmp_path / "{epoch}.keras"), epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.keras", "2.keras"]


@pytest.mark.parametrize("update_bn", [True, False])
def test_batch_norm_is_that_of_the_average_or_left_alone(update_bn, tmp_path):
    swa = SWA(EVERY_EPOCH, bn_data=(X, Y), finalize=False)
    model, path = with_batch_norm(), tmp_path / "x.keras"
    saving = swa.checkpoint(path, update_bn=update_bn)
    fit(model, swa, saving, epochs=2)
    live = [np.array(w) for w in model.get_weights()]
    with swa.averaged(model):
        expected = [np.array(w) for w in model.get_weights()]
    statistics = model.layers[1].moving_mean.path, model.layers[1].moving_variance.path
    for variable, mine, averaged, raw in zip(
        model.weights, loaded(path).get_weights(), expected, live, strict=True
    ):
        raw_wanted = not update_bn and variable.path in statistics
        np.testing.assert_array_equal(mine, raw if raw_wanted else averaged)


READER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("swa_keras", "swa_core"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
import keras

model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], model.predict(np.load(sys.argv[3]), verbose=0))
model.fit(np.load(sys.argv[3]), np.zeros(24), verbose=0)  # with its optimizer
assert not any(name.startswith("swa_") for name in sys.modules)
"""


def test_the_file_loads_anywhere_without_this_package(tmp_path):
    swa = SWA(EVERY_EPOCH, bn_data=(X, Y))
    model, path = with_batch_norm(), tmp_path / "x.keras"
    fit(model, swa, swa.checkpoint(path), epochs=2, validation_data=(X, Y))
    np.save(tmp_path / "x.npy", X)
    files = [path, tmp_path / "predicted.npy", tmp_path / "x.npy"]
    done = subprocess.run(
        [sys.executable, "-c", READER, *files],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = model.predict(X, verbose=0)  # fit has ended on the same average
    np.testing.assert_allclose(np.load(files[1]), expected, rtol=1e-6)
