"""Lists of callbacks that would undo the average: said before, at, and after the training."""

from __future__ import annotations

import pickle
import warnings

import keras
import pytest
from adapter_keras.small_models import X, Y, dense, fit, same, weights

from swa_core import SWAError, SWAWarning
from swa_keras import SWA
from swa_keras.checking import list_calling

k = keras.callbacks
EVERY_EPOCH = {"start": "1ep", "every": "1ep"}


def said(*callbacks, how=SWA.check):
    """What is warned of; where, if it is by SWA.check."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how(list(callbacks))
    caught = [w for w in caught if issubclass(w.category, SWAWarning)]
    if how is SWA.check:
        assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def restoring(monitor="loss", **arguments):
    return k.EarlyStopping(monitor, restore_best_weights=True, **arguments)


def checkpoint(monitor, **arguments):
    return k.ModelCheckpoint("x.keras", monitor=monitor, **arguments)


def one(message, *callbacks):
    (found,) = said(*callbacks)
    assert message in found
    return found


def test_the_list_is_returned_so_that_it_can_be_written_in_place():
    callbacks = [SWA({}), k.TerminateOnNaN()]
    assert SWA.check(callbacks) is callbacks
    assert SWA.check(None) is None
    assert SWA({}).check(()) == ()


def test_a_list_that_is_good_needs_no_words(tmp_path):
    swa = SWA({})
    assert not said(
        restoring(),
        k.EarlyStopping("val_swa_loss", mode="min"),
        swa,
        k.EarlyStopping("val_loss"),
        k.ReduceLROnPlateau("val_swa_loss", mode="min"),
        swa.checkpoint(tmp_path / "best.keras", save_best_only=True),
        swa.backup(tmp_path / "backup"),
        checkpoint("val_loss", save_best_only=True),
        k.LearningRateScheduler(lambda epoch, rate: rate),
        k.CSVLogger("log.csv"),
    )
    assert not said(restoring(), checkpoint("val_loss"))  # without us
    assert not said()


def test_weights_restored_after_the_average_was_put_in():
    one("EarlyStopping(restore_best_weights=True) is listed after SWA", SWA({}), restoring())
    # Nothing is overwritten where fit does not end on the average.
    assert not said(SWA({}, finalize=False), restoring())
    # As Keras does, lists in lists are taken for one.
    one("is listed after SWA", [SWA({}), [restoring()]])


@pytest.mark.parametrize("best", [True, False])
def test_raw_weights_saved_by_an_averaged_metric(best):
    saving = checkpoint("val_swa_loss", mode="min", save_best_only=best)
    one("Take swa.checkpoint(path, monitor='val_swa_loss', ...)", SWA({}), saving)
    one("saves the training weights", saving, SWA({}))


def test_raw_weights_saved_by_a_metric_that_the_average_replaces():
    best = checkpoint("val_loss", save_best_only=True)
    one("ModelCheckpoint(monitor='val_loss') goes by", best, SWA({}, validate="average"))
    # The metric is that of the weights it saves, or does not matter.
    assert not said(best, SWA({}))
    assert not said(checkpoint("val_loss"), SWA({}, validate="average"))
    assert not said(checkpoint("loss", save_best_only=True), SWA({}, validate="average"))


def test_a_metric_that_is_not_logged():
    early = k.EarlyStopping("val_swa_mae", mode="min")
    one("val_mae is the average's", SWA({}, validate="average"), early)
    one('Pass SWA(..., validate="both")', early, SWA({}, validate="raw"))


def test_a_metric_that_keras_cannot_judge():
    for callback in (k.EarlyStopping("val_swa_loss"), k.ReduceLROnPlateau("val_swa_loss")):
        name = type(callback).__name__
        one(f"Say it: {name}(monitor='val_swa_loss', mode=\"min\")", SWA({}), callback)
        # Keras does raise.
        swa = SWA(EVERY_EPOCH)
        with pytest.warns(SWAWarning), pytest.raises(ValueError, match="isn't able to auto"):
            fit(dense(), swa, callback, validation_data=(X, Y), epochs=1)


def test_a_backup_without_the_average(tmp_path):
    one("Take swa.backup(dir) in its place", SWA({}), k.BackupAndRestore(tmp_path / "backup"))


def test_what_belongs_to_an_average_that_is_not_in_the_list(tmp_path):
    other = SWA({})
    one("swa.checkpoint(...) is in the list", SWA({}), other.checkpoint("x.keras"))
    one("swa.backup(...) is in the list", other.backup(tmp_path))


def test_two_averages_in_each_others_way():
    for validate, names in (("both", "val_swa_*"), ("average", "val_*")):
        two = [SWA({}, validate=validate, finalize=False) for _ in range(2)]
        one(f"all log {names}", *two)
    raw = SWA({}, validate="raw")
    one("the last one stays", raw, SWA({}))
    assert not said(SWA({}, validate="average", finalize=False), SWA({}))


def test_keras_own_average_is_refused():
    with pytest.raises(SWAError, match="SwapEMAWeights is in the list") as error:
        SWA.check([k.SwapEMAWeights(), SWA({})])
    assert 'rule = { name = "ema"' in str(error.value)
    SWA.check([k.SwapEMAWeights()])


def test_fit_makes_the_same_checks_and_says_nothing_twice():
    model, swa = dense(), SWA(EVERY_EPOCH)
    with pytest.raises(SWAError, match="SwapEMAWeights is in the list"):
        fit(model, SWA(EVERY_EPOCH), k.SwapEMAWeights())
    best = checkpoint("val_swa_loss", mode="min", save_best_only=True)
    best.save_freq = 100  # saves nothing

    def train(callbacks):
        fit(model, *callbacks, epochs=1, validation_data=(X, Y))

    assert len(said(best, swa, how=train)) == 1
    assert not said(best, swa, how=train)
    # By the user and then by fit.
    swa = SWA(EVERY_EPOCH)
    assert len(said(best, swa)) == 1
    assert not said(best, swa)
    assert not said(best, swa, how=train)
    pickle.dumps(SWA(EVERY_EPOCH))


@pytest.mark.parametrize("optimizer", ["plain", "loss-scaled", "several"])
def test_use_ema_is_refused_wherever_it_is_said(optimizer):
    made = keras.optimizers.SGD(0.1, use_ema=True)
    if optimizer == "loss-scaled":
        made = keras.optimizers.LossScaleOptimizer(made)
    model = dense(made)
    if optimizer == "several":
        which = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*bias": made})
        model.compile(keras.optimizers.MultiOptimizer(which), "mse")
    with pytest.raises(SWAError, match="use_ema=True"):
        fit(model, SWA({}))


def test_the_end_of_training_tells_what_overwrote_the_average():
    model, swa = dense(), SWA(EVERY_EPOCH)
    early, late = said(swa, restoring(), how=lambda callbacks: fit(model, *callbacks, epochs=2))
    assert "is listed after SWA" in early
    assert "fit does not end on the average" in late
    average = swa.averaged_weights
    with pytest.raises(AssertionError):
        same(weights(model), average)
    swa.finalize(model)  # as the warning says
    same(weights(model), average)


def test_the_end_of_training_tells_of_a_callback_that_nobody_knows():
    class Rounding(k.Callback):
        def on_train_end(self, logs=None):
            self.model.set_weights([w.round(1) for w in self.model.get_weights()])

    with pytest.warns(SWAWarning, match="fit does not end on the average"):
        fit(dense(), SWA(EVERY_EPOCH), Rounding(), epochs=1)
    # In good order, or where the model is to keep its weights, there is nothing to say.
    fit(dense(), Rounding(), SWA(EVERY_EPOCH), epochs=1)
    fit(dense(), SWA(EVERY_EPOCH, finalize=False), Rounding(), epochs=1)


def test_early_stopping_that_restores_nothing_is_no_matter_at_the_end():
    stopping = restoring(start_from_epoch=9)
    swa = SWA(EVERY_EPOCH)
    (early,) = said(swa, stopping, how=lambda callbacks: fit(dense(), *callbacks, epochs=1))
    assert "is listed after SWA" in early


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_an_average_that_is_in_place_is_known_in_every_precision(policy):
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype=policy)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    swa = SWA(EVERY_EPOCH)
    fit(model, swa, epochs=2)  # where a warning would be an error
    same(weights(model), [w.astype(policy).astype("float32") for w in swa.averaged_weights])


def test_a_callback_finds_the_list_that_calls_it_and_no_other():
    class Looking(k.Callback):
        def on_train_begin(self, logs=None):
            self.found = list_calling(self)

    class Deeper(Looking):
        def on_train_begin(self, logs=None):
            super().on_train_begin(logs)

    looking, deeper = Looking(), Deeper()
    fit(dense(), looking, deeper, epochs=1)
    assert looking.found is deeper.found
    assert looking.found.callbacks[:2] == [looking, deeper]
    looking.on_train_begin()
    assert looking.found is None
