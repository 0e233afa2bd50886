"""Programs that nobody should write and somebody will: all is given back, and nothing stays."""

from __future__ import annotations

import copy
import gc
import weakref

import keras
import pytest
from adapter_keras.small_models import X, Y, dense, fit, same, weights

from swa_core import SwappedError
from swa_keras import SWA, SWAOptimizer

k = keras.callbacks
EVERY_EPOCH = {"start": "1ep", "every": "1ep"}
EVERY_STEP = {"start": "1step", "every": "1step"}


@pytest.mark.parametrize("second", ["averaged", "finalize", "averaged by the optimizer"])
def test_an_average_that_two_can_lend_is_lent_once(second):
    optimizer = SWAOptimizer(keras.optimizers.SGD(0.05), EVERY_STEP)
    model = dense(optimizer)
    one, two = SWA(finalize=False), SWA(finalize=False)
    fit(model, one, epochs=1)
    fit(model, two, epochs=1)
    before, average = weights(model), one.averaged_weights
    lend = {
        "averaged": lambda: two.averaged().__enter__(),
        "finalize": two.finalize,
        "averaged by the optimizer": lambda: optimizer.averaged(model).__enter__(),
    }
    with one.averaged(), pytest.raises(SwappedError):
        lend[second]()
    same(weights(model), before)
    same(two.averaged_weights, average)


def interrupted_fit(model, swa, hook):
    """A fit that Ctrl-C ends in the second epoch."""

    def interrupt(number=0, logs=None):
        if hook != "on_epoch_begin" or number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(model, swa, k.LambdaCallback(**{hook: interrupt}), validation_data=(X, Y))
    # Frames hold what was at work in them.
    caught.value.__traceback__ = None


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_epoch_end"])
def test_interrupted_fits_leave_no_average_behind(hook):
    model, gone = dense(), []
    for _ in range(2):
        swa = SWA(EVERY_EPOCH)
        interrupted_fit(model, swa, hook)
        gone.append(weakref.ref(swa))
        del swa
        gc.collect()
    assert [swa() for swa in gone] == [None, None]
    history = fit(model, SWA(EVERY_EPOCH), validation_data=(X, Y)).history
    assert "val_swa_loss" in history
    assert "evaluate" not in vars(model)


def test_a_callback_list_of_ones_own_may_serve_several_fits():
    model = dense()
    callbacks = k.CallbackList([SWA(EVERY_EPOCH)], add_history=True, model=model)
    lengths = set()
    for _ in range(3):
        model.fit(X, Y, batch_size=6, verbose=0, callbacks=callbacks)
        lengths.add(len(callbacks.callbacks))
    assert len(lengths) == 1


def test_a_callback_that_is_copied_during_fit_leaves_the_fit_alone():
    model, swa, copies = dense(), SWA(EVERY_STEP), []

    class Copying(k.Callback):
        def on_epoch_end(self, epoch, logs=None):
            copies.append((copy.deepcopy(swa), swa.averaged_weights))

    history = fit(model, swa, Copying(), epochs=2, validation_data=(X, Y)).history
    assert len(history["val_swa_loss"]) == 2
    assert "evaluate" not in vars(model)
    for copied, average in copies:
        same(copied.averaged_weights, average)
    fit(copies[0][0].model, copies[0][0], epochs=1)
    assert copies[0][0].n_averaged == 8
