"""Counting updates: only snapshots cost a synchronisation, and nothing that the optimizer does or
that is done to it makes the count wrong in silence."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import (
    STEPS,
    Updates,
    X,
    Y,
    array,
    averages,
    compiled,
    dense,
    everything,
    fit,
    same,
    weights,
)
from adapter_keras.test_fit_execution import own_step

from swa_core import SWAError
from swa_keras import SWA
from swa_keras.clock import UpdateCounter

BACKEND = keras.backend.backend()


class Watched(keras.Sequential):
    """Counts how often the jax backend is asked to bring the variables up to date."""

    syncs = 0

    def jax_state_sync(self):
        Watched.syncs += not getattr(self, "_jax_state_synced", True)
        if BACKEND == "jax":
            super().jax_state_sync()


class Costs(keras.callbacks.Callback):
    """What each update of a ``fit`` has cost: syncs, and reads of the optimizer's counter."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads, self.now, self.of = 0, (0, 0), []
        read = UpdateCounter._read

        def counting(counter):
            self.reads += 1
            return read(counter)

        monkeypatch.setattr(UpdateCounter, "_read", counting)

    def on_train_batch_end(self, batch, logs=None):
        before, self.now = self.now, (Watched.syncs, self.reads)
        self.of.append(tuple(b - a for a, b in zip(before, self.now, strict=True)))


@pytest.mark.parametrize("accumulation", [None, 2])
def test_an_update_that_is_no_snapshot_syncs_nothing(monkeypatch, accumulation):
    keras.utils.set_random_seed(7)
    model = Watched([keras.Input((4,)), keras.layers.Dense(1)])
    compiled(model, keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulation))
    snapshots = {"start": "5step", "every": "4step"}
    swa = SWA(snapshots, validate="raw", finalize=False)
    costs = Costs(monkeypatch)
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0, callbacks=[swa, costs])
    n = accumulation or 1
    expected = {n * update for update in range(5, 24 // n + 1, 4)}
    assert len(costs.of) == 24
    assert swa.n_averaged == len(expected)
    # The first batch of an epoch reads counters that are in place: no sync, but those reads, and
    # the sync of Keras itself at the end of the first epoch.
    for batch, cost in enumerate(costs.of, start=1):
        if batch not in {1, 13}:
            syncs = int(BACKEND == "jax") if batch in expected else 0
            assert cost == (syncs, int(batch in expected))


def test_with_loss_scaling_only_possible_snapshots_sync(monkeypatch):
    keras.utils.set_random_seed(7)
    model = Watched([keras.Input((4,)), keras.layers.Dense(1)])
    inner = keras.optimizers.SGD(0.01)
    # So large a scale that the first steps overflow, and only lower it.
    compiled(model, keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127))
    swa = SWA({"start": "6step", "every": "99step"}, validate="raw", finalize=False)
    updates, costs = Updates(), Costs(monkeypatch)
    model.fit(X, Y, batch_size=1, epochs=1, verbose=0, callbacks=[swa, costs, updates])
    skipped = 24 - len(updates.after)
    assert 1 < skipped < 18
    averages(swa, updates.after)
    reads = [cost[1] for cost in costs.of]
    # It looks when the snapshot may be due; again when it still may be, and never after it.
    assert not any(reads[1:5])
    assert 1 < sum(reads[5:]) <= 1 + skipped
    assert not any(reads[6 + skipped :])


def test_loss_scaling_and_accumulation_together():
    inner = keras.optimizers.SGD(0.01, gradient_accumulation_steps=3)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127)
    updates, swa = Updates(), SWA({"start": "1step", "every": "2step"}, finalize=False)
    fit(dense(optimizer), updates, swa, epochs=6)
    assert 3 < len(updates.after) < 8
    assert swa.updates == len(updates.after)
    averages(swa, updates.after)


def test_a_scale_that_overflows_again_in_mid_training():
    inner = keras.optimizers.SGD(0.01)
    # Doubled after every two good steps, until it overflows.
    optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=2.0**121, dynamic_growth_steps=2
    )
    updates, swa = Updates(), SWA({"start": "3step", "every": "1step"}, finalize=False)
    fit(dense(optimizer), updates, swa, epochs=6)
    assert 12 < len(updates.after) < 24
    assert swa.updates == len(updates.after)
    averages(swa, updates.after)


def test_half_precision_scales_the_loss_by_itself():
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(5, dtype="mixed_float16"), keras.layers.Dense(1)]
    model = compiled(keras.Sequential([keras.Input((4,)), *layers]))
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)), "mse")
    updates, swa = Updates(), SWA({"start": "3step", "every": "2step"}, finalize=False)
    fit(model, updates, swa)
    assert 3 < len(updates.after) == swa.updates
    averages(swa, updates.after)


def test_several_updates_in_a_batch_are_refused():
    with pytest.raises(SWAError, match="counts 4 updates in 2 batches") as error:
        fit(own_step(updates_per_batch=2), SWA({"start": "2step", "every": "4step"}))
    assert "swa.update(model)" in str(error.value)


class Alone(keras.Model):
    """A model that no optimizer moves."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, *arguments):
        return ({"loss": 0.0}, arguments[0]) if BACKEND == "jax" else {"loss": 0.0}


def alone(optimizer):
    model = Alone()
    model.compile(optimizer, "mse", run_eagerly=True)
    model(X)
    return model


@pytest.mark.parametrize("start", ["2step", "9step"])
def test_an_optimizer_that_stands_still_is_refused_after_the_first_epoch(start):
    with pytest.raises(SWAError, match="made no update in 4 batches"):
        fit(alone("sgd"), SWA({"start": start, "every": "1step"}))


def test_a_model_without_an_optimizer_is_refused():
    model = alone(None) if BACKEND != "jax" else dense()
    model.optimizer = None
    with pytest.raises(SWAError, match="has no optimizer"):
        fit(model, SWA({"start": "2step", "every": "1step"}))


class Reloads(keras.callbacks.Callback):
    """Keeps everything after the first epoch, and goes back to it after the third."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_epoch_begin(self, epoch, logs=None):
        if self.at == "begin":
            self.turn(epoch)

    def on_epoch_end(self, epoch, logs=None):
        if self.at == "end":
            self.turn(epoch + 1)

    def turn(self, epoch):
        model = self.model
        if epoch == 1:
            self.kept = everything(model)
        if epoch == 3:
            for variable, value in zip(variables_of(model), self.kept, strict=True):
                variable.assign(value)


def variables_of(model):
    return [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("at", ["begin", "end"])
def test_a_checkpoint_loaded_between_epochs_does_not_turn_the_clock_back(at, ours_first):
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    updates, swa = Updates(), SWA({"start": "1step", "every": "2step"}, finalize=False)
    callbacks = [swa, Reloads(at)] if ours_first else [Reloads(at), swa]
    fit(dense(optimizer), updates, *callbacks, epochs=5)
    assert swa.updates == len(updates.after) == 10
    averages(swa, updates.after)


def test_a_checkpoint_with_a_later_count_is_not_taken_for_updates():
    trained, model = dense(), dense()
    fit(trained, epochs=10)
    later = everything(trained)

    def load(epoch, logs):
        if epoch == 2:
            for variable, value in zip(variables_of(swa.model), later, strict=True):
                variable.assign(value)

    updates, swa = Updates(), SWA({"start": "1step", "every": "3step"}, finalize=False)
    model.optimizer.build(model.trainable_variables)
    hook = keras.callbacks.LambdaCallback(on_epoch_begin=load)
    fit(model, hook, updates, swa)
    assert swa.updates == len(updates.after) == 16
    averages(swa, updates.after)


def test_weights_loaded_in_mid_training_are_averaged_from_the_next_snapshot_on():
    values = [np.full_like(w, 0.5) for w in weights(dense())]

    class Loads(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.set_weights(values)

    updates, swa = Updates(), SWA({"start": "1step", "every": "1step"}, finalize=False)
    fit(dense(), Loads(), updates, swa)
    assert swa.n_averaged == 16
    averages(swa, updates.after)
    same(updates.after[2], values)


def test_a_model_that_is_compiled_again_goes_on_with_a_fresh_optimizer():
    updates, swa = Updates(), SWA({"start": "3step", "every": "3step"}, finalize=False)
    model = dense()
    fit(model, updates, swa, epochs=1)
    compiled(model, keras.optimizers.Adam(0.01))
    fit(model, updates, swa, epochs=1)
    assert int(array(model.optimizer.iterations)) == STEPS
    assert swa.updates == 2 * STEPS
    averages(swa, updates.after)


def test_updates_are_told_right_to_callbacks_anywhere_in_the_list():
    seen = []
    swa = SWA({"start": "4step", "every": "4step"}, finalize=False)
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(swa.updates)
    )
    updates = Updates()
    fit(dense(), hook, updates, swa, hook)
    assert seen == [n // 2 + 1 for n in range(32)]
    averages(swa, updates.after)


def test_a_state_saved_at_the_same_batch_before_or_after_our_turn_is_the_same():
    states = []
    swa = SWA({"start": "2step", "every": "2step"}, finalize=False)
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: states.append(swa.state_dict())
    )
    updates = Updates()
    fit(dense(), updates, hook, swa, hook, epochs=2)
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert before["n_updates"] == after["n_updates"]
        assert before["n_averaged"] == after["n_averaged"]
        same(before["average"], after["average"])
    averages(swa, updates.after)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin"])
def test_a_state_loaded_by_a_callback_is_gone_on_from(hook, ours_first):
    config = {"start": "3step", "every": "2step"}
    earlier, updates = SWA(config, finalize=False), Updates()
    fit(dense(), updates, earlier, epochs=1)
    saved, swa, left = earlier.state_dict(), SWA(config, finalize=False), [1]

    def load(*_, **__):
        if left and left.pop():
            swa.load_state_dict(saved)
            updates.after = {n: w for n, w in updates.after.items() if n <= 4}

    loads = keras.callbacks.LambdaCallback(**{hook: load})
    fit(dense(), updates, *([swa, loads] if ours_first else [loads, swa]), epochs=2)
    assert swa.updates == len(updates.after) == 12
    averages(swa, updates.after)
