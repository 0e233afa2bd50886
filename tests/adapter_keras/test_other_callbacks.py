"""Keras' own callbacks beside ours: what they see, log and do."""

from __future__ import annotations

import csv
import re

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, dense, everything, fit, same, weights

from swa_core import LearningRate, SWAConfig, SWAWarning
from swa_keras import SWA

k = keras.callbacks
EVERY_EPOCH = {"start": "1ep", "every": "1ep"}
HALF = {"start": "50%", "every": "1ep"}
IN_ANY_ORDER = pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])


class Rates(k.Callback):
    """The rate that made each update."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(array(self.model.optimizer.learning_rate)))


def train(model, swa, other, first, **arguments):
    arguments = {"validation_data": (X, Y), **arguments}
    return fit(model, *([swa, other] if first else [other, swa]), **arguments)


@IN_ANY_ORDER
def test_csv_logger_has_all_columns_from_the_first_epoch(first, tmp_path):
    logger = k.CSVLogger(tmp_path / "log.csv")
    history = train(dense(), SWA(HALF), logger, first).history
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"loss", "mae", "val_loss", "val_mae", "val_swa_loss", "val_swa_mae"}
    assert set(rows[0]) == names | {"epoch"}
    for name in names:
        np.testing.assert_allclose([float(row[name]) for row in rows], history[name])
    assert rows[0]["val_swa_loss"] == rows[0]["val_loss"]


def curves(folder):
    """The scalars in the event files of a folder, by tag: (step, value)."""
    import tensorflow as tf

    found = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.HasField("tensor"):
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


@IN_ANY_ORDER
def test_tensorboard_draws_the_averaged_metrics_as_curves_of_their_own(first, tmp_path):
    board = k.TensorBoard(tmp_path, write_graph=False)
    history = train(dense(), SWA(HALF), board, first).history
    found = curves(tmp_path / "validation")
    for name in ("loss", "mae", "swa_loss", "swa_mae"):
        steps, values = zip(*found[f"epoch_{name}"], strict=True)
        assert steps == (0, 1, 2, 3)
        np.testing.assert_allclose(values, history[f"val_{name}"], rtol=1e-6)
    # One point for each validation, of the training weights, as without us.
    assert len(found["evaluation_loss_vs_iterations"]) == 4
    values = [value for _, value in found["evaluation_loss_vs_iterations"]]
    np.testing.assert_allclose(values, history["val_loss"], rtol=1e-6)


@IN_ANY_ORDER
def test_reduce_lr_on_plateau_goes_by_the_average(first):
    class Worse(k.LambdaCallback):
        """Makes the average stand still."""

        def on_epoch_end(self, epoch, logs=None):
            logs["val_swa_loss"] = 1.0

    reduce = k.ReduceLROnPlateau("val_swa_loss", factor=0.5, patience=1, mode="min")
    model = dense(keras.optimizers.SGD(0.04))
    seen = []
    rates = k.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(float(array(model.optimizer.learning_rate)))
    )
    swa = SWA(EVERY_EPOCH)
    callbacks = [swa, Worse(), reduce] if first else [Worse(), reduce, swa]
    fit(model, *callbacks, rates, validation_data=(X, Y))
    np.testing.assert_allclose(seen, [0.04, 0.02, 0.01, 0.005], rtol=1e-6)


@IN_ANY_ORDER
def test_what_reduce_lr_on_plateau_sees_is_what_is_logged(first):
    reduce = k.ReduceLROnPlateau("val_swa_loss", mode="min")
    history = train(dense(), SWA(EVERY_EPOCH), reduce, first).history
    assert reduce.best == min(history["val_swa_loss"])


@IN_ANY_ORDER
def test_a_learning_rate_scheduler_and_the_rate_of_the_configuration(first):
    config = SWAConfig(start="2ep", every="1ep", lr=LearningRate(value=0.01))
    scheduler = k.LearningRateScheduler(lambda epoch, rate: 0.03)
    rates = Rates()
    callbacks = [SWA(config), scheduler] if first else [scheduler, SWA(config)]
    with pytest.warns(SWAWarning, match="something set the learning rate to 0.03"):
        fit(dense(), *callbacks, rates)
    np.testing.assert_allclose(rates.rates, [0.03] * 8 + [0.01] * 8, rtol=1e-6)


@IN_ANY_ORDER
@pytest.mark.parametrize("validate", ["both", "average"])
def test_early_stopping_goes_by_the_average(first, validate):
    name = "val_swa_loss" if validate == "both" else "val_loss"
    stopping = k.EarlyStopping(name, mode="min", patience=2)
    swa = SWA(EVERY_EPOCH, validate=validate)
    model = dense(keras.optimizers.SGD(0.4, momentum=0.9))  # so fast that it gets worse again
    history = train(model, swa, stopping, first, epochs=12).history
    losses = history[name]
    assert stopping.best == min(losses)
    assert len(losses) == int(np.argmin(losses)) + 3 < 12
    same(weights(model), swa.averaged_weights)


@IN_ANY_ORDER
def test_model_checkpoint_saves_the_training_weights_by_their_own_metric(first, tmp_path):
    plain, model = dense(), dense()
    name = "{epoch}.weights.h5"
    saving = {
        "monitor": "val_loss",
        "save_weights_only": True,
        "save_best_only": True,
    }
    fit(plain, k.ModelCheckpoint(tmp_path / "plain" / name, **saving), validation_data=(X, Y))
    train(model, SWA(EVERY_EPOCH), k.ModelCheckpoint(tmp_path / "ours" / name, **saving), first)
    found = {path.name for path in (tmp_path / "ours").iterdir()}
    assert found == {path.name for path in (tmp_path / "plain").iterdir()}
    for each in found:
        for model, kind in ((plain, "plain"), (dense(), "ours")):
            model.optimizer.build(model.trainable_variables)
            model.load_weights(tmp_path / kind / each)
            values = everything(model)
            if kind == "plain":
                expected = values
        same(values, expected)


@IN_ANY_ORDER
def test_terminate_on_nan_ends_the_training_on_the_last_good_average(first):
    config = {"start": "1step", "every": "1step"}
    model = dense()
    poison = k.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: (
            model.layers[0].bias.assign(np.full(5, np.nan)) if epoch == 2 else None
        )
    )
    swa = SWA(config)
    callbacks = [swa, k.TerminateOnNaN()] if first else [k.TerminateOnNaN(), swa]
    history = fit(model, poison, *callbacks)
    assert len(history.epoch) == 3
    assert (swa.n_averaged, swa.n_skipped) == (8, 1)
    assert all(np.isfinite(w).all() for w in weights(model))
    same(weights(model), swa.averaged_weights)


@pytest.mark.parametrize("validate", ["both", "average", "raw"])
def test_lambda_callbacks_are_called_as_without_us(validate):
    def calls(*ours):
        seen = []

        class Spy(k.Callback):
            pass

        def spying(hook):
            def spy(self, *arguments, logs=None):
                numbers = [a for a in arguments if isinstance(a, int)]
                seen.append((hook, *numbers))

            return spy

        for hook in dir(k.Callback):
            if hook.startswith("on_"):
                setattr(Spy, hook, spying(hook))
        fit(dense(), Spy(), *ours, validation_data=(X, Y), epochs=3)
        return seen

    assert calls(SWA(EVERY_EPOCH, validate=validate)) == calls()


def test_the_progress_bar_shows_the_averaged_metrics(capsys):
    fit(dense(), SWA(HALF), validation_data=(X, Y), verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if " - loss: " in line]
    assert len(lines) == 4
    for line in lines:
        for name in ("loss", "mae", "val_loss", "val_mae", "val_swa_loss", "val_swa_mae"):
            assert len(re.findall(rf" - {name}: \d", line)) == 1


def test_no_second_progress_bar_for_the_second_validation(capsys):
    def printed(*callbacks):
        fit(dense(), *callbacks, validation_data=(X, Y), verbose=1)
        return capsys.readouterr().out

    assert printed(SWA(HALF)).count("━ 4/4") == printed().count("━ 4/4")


def test_without_validation_data_there_is_nothing_to_add():
    history = fit(dense(), SWA(EVERY_EPOCH))
    assert set(history.history) == {"loss", "mae"}
