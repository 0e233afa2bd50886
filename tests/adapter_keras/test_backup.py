"""``swa.backup``: a training goes on after its last backup, average included, bit for bit.

Here the process goes on; in test_killed.py it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil

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

from swa_core import EMA, LearningRate, StateError, StructureError, SWAConfig, SWAError
from swa_keras import SWA

HALF = {"start": "50%", "every": "1ep"}
WITH_RATE = SWAConfig(
    start="2ep", every="2step", rule=EMA(0.7), lr=LearningRate(value=0.01, anneal="1ep")
)


class Raise(keras.callbacks.Callback):
    """Ends the training at a moment of it."""

    def __init__(self, epoch=None, batch=None):
        super().__init__()
        self.epoch, self.batch, self.now = epoch, batch, None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, self.batch):
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        if (epoch, None) == (self.epoch, self.batch):
            raise KeyboardInterrupt


def run(make, config, folder, *others, first, interrupted=True, save_freq="epoch", **arguments):
    """A program that trains, as it is started once and again."""
    keras.utils.set_random_seed(7)
    model, swa = make(), SWA(config, finalize=False, bn_data=(X, Y))
    backup = swa.backup(folder, save_freq=save_freq)
    callbacks = [backup, swa] if first else [swa, backup]
    arguments = {"shuffle": False, "validation_data": (X, Y), **arguments}
    try:
        fit(model, *callbacks, *others, **arguments)
        assert not interrupted
    except KeyboardInterrupt:
        assert interrupted
    return model, swa


def state(swa):
    saved = swa.state_dict()
    return saved.pop("average"), saved


def same_end(one, other):
    (model, swa), (other_model, other_swa) = one, other
    same(everything(model), everything(other_model))
    (average, rest), (other_average, other_rest) = state(swa), state(other_swa)
    same(average, other_average)
    assert rest | {"paths": None} == other_rest | {"paths": None}  # names count through a process


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("case", ["updates", "epochs", "batch norm, dropout, shuffled"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(case, first, tmp_path):
    make = with_batch_norm if "batch norm" in case else dense
    config = HALF if case == "epochs" else WITH_RATE
    data = {"data": stream()} if case == "epochs" else {}
    if "shuffled" in case and keras.backend.backend() != "tensorflow":
        data = {"shuffle": True}  # the state of tensorflow's random numbers cannot be read
    whole = run(make, config, tmp_path / "whole", first=first, interrupted=False, **data)
    folder = tmp_path / "interrupted"
    for at in (Raise(1, 2), Raise(3, 0), Raise(3)):  # the last one after the last backup
        run(make, config, folder, at, first=first, **data)
        assert len(list(folder.iterdir())) == 1
    resumed = run(make, config, folder, first=first, interrupted=False, **data)
    same_end(resumed, whole)
    assert not folder.exists()


def test_fit_ends_on_the_average_also_if_only_its_end_was_missing(tmp_path):
    class EndWithout(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise KeyboardInterrupt

    def train(*others):
        model, swa = dense(), SWA(HALF)
        fit(model, *others, swa, swa.backup(tmp_path), shuffle=False)
        return model, swa

    with pytest.raises(KeyboardInterrupt):
        train(EndWithout())
    model, swa = train()
    same(weights(model), swa.averaged_weights)
    assert swa.n_averaged == 3


def test_backups_after_so_many_batches_hold_one_moment(tmp_path):
    """Keras begins the epoch anew then; the average is that of the weights that are restored."""
    config = {"start": "1step", "every": "1step"}
    for first in (True, False):
        folder = tmp_path / str(first)
        _, before = run(dense, config, folder, Raise(1, 2), first=first, save_freq=3)
        # Of the seven updates six are in the backup.
        assert before.updates == 7
        seen = []

        class Start(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None, seen=seen):
                seen.append((epoch, weights(self.model)))

        model, swa = dense(), SWA(config, finalize=False)
        fit(model, Start(), swa, swa.backup(folder, save_freq=3), epochs=1, shuffle=False)
        assert not seen  # the first epoch is complete
        assert (swa.updates, swa.n_averaged) == (6, 6)


def test_a_folder_with_remains_of_an_interruption(tmp_path):
    folder = tmp_path / "backup"
    run(dense, HALF, folder, Raise(2, 1), first=False)
    (newest,) = folder.iterdir()
    assert newest.name == "backup-00000002"
    # An older one that was not removed any more, a newer one that did not become whole, and
    # somebody's notes.
    shutil.copytree(newest, folder / "backup-00000001")
    (folder / "backup-00000001" / "training.json").write_text("{}")
    shutil.copytree(newest, folder / ".partial-1234")
    (folder / ".partial-1234" / "model.weights.h5").write_text("half")
    (folder / "notes.txt").write_text("mine")
    whole = run(dense, HALF, tmp_path / "whole", first=False, interrupted=False)
    same_end(run(dense, HALF, folder, first=False, interrupted=False), whole)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_the_backup_is_kept_if_asked_for(tmp_path):
    swa = SWA(HALF)
    fit(dense(), swa, swa.backup(tmp_path, delete_checkpoint=False))
    (kept,) = tmp_path.iterdir()
    found = SWA.load(kept / "average.safetensors")
    assert (found.n_averaged, found.updates) == (3, 16)


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_step_of_writing_leaves_one_of_the_two_backups(tmp_path, monkeypatch):
    """Every call that changes the disk in turn is the first that does not happen any more."""
    model, swa = dense(), SWA({"start": "1step", "every": "1step"})
    model.optimizer.build(model.trainable_variables)

    def moment(model, swa, epoch):
        average = swa.averaged_weights if swa.n_averaged else []
        return [*everything(model), *average, np.array([swa.n_averaged, epoch])]

    folder = tmp_path / "backup"
    backup, outcomes = swa.backup(folder), set()
    backup.set_model(model)
    backup.on_epoch_end(-1)
    before = moment(model, swa, 0)
    for step in range(100):
        model.train_on_batch(X, Y)
        swa.update(model)
        now, calls = moment(model, swa, step + 1), []

        def dying(function, calls=calls, step=step):
            def call(*arguments, **keywords):
                calls.append(function)
                if len(calls) > step:
                    raise Crash
                return function(*arguments, **keywords)

            return call

        with monkeypatch.context() as patched:
            for name in ("mkdir", "fsync", "replace", "rmdir", "unlink"):
                patched.setattr(os, name, dying(getattr(os, name)))
            with contextlib.suppress(Crash):
                backup.on_epoch_end(step)
        other, other_swa = dense(), SWA({"start": "1step", "every": "1step"})
        reader = other_swa.backup(folder)
        reader.set_model(other)
        reader.on_train_begin()
        found = moment(other, other_swa, other._initial_epoch)
        outcome = "new" if found[-1][1] == step + 1 else "old"
        same(found, now if outcome == "new" else before)
        outcomes.add(outcome)
        before = found
        if len(calls) <= step:  # nothing crashed any more
            break
    assert outcomes == {"old", "new"}
    assert len(calls) > 10


def test_what_cannot_be_loaded_is_refused(tmp_path):
    folder = tmp_path / "backup"
    run(dense, HALF, folder, Raise(1, 1), first=False)
    with pytest.raises(StateError, match="made with rule"):
        run(dense, SWAConfig(**HALF, rule=EMA(0.5)), folder, first=False)
    with pytest.raises(StateError, match="made with schedule"):
        run(dense, {"start": "75%", "every": "1ep"}, folder, first=False)
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises((SWAError, ValueError)):
        run(lambda: unbuilt, HALF, folder, first=False)
    with pytest.raises((StructureError, ValueError)):
        run(with_batch_norm, HALF, folder, first=False)
    (backup,) = folder.iterdir()
    (backup / "training.json").write_text('{"version": 1}')
    with pytest.raises(StateError, match=r"training\.json is damaged"):
        run(dense, HALF, folder, first=False)
    for bad in ({"backup_dir": ""}, {"backup_dir": tmp_path, "save_freq": "often"}):
        with pytest.raises(ValueError, match=r"[Ee]mpty|save_freq"):
            SWA(HALF).backup(**bad)
