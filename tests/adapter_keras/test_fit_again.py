"""Several trainings with one callback: one after the other, of different lengths, with loops in
between, broken off by errors; and what a training needs that takes no snapshot."""

from __future__ import annotations

import keras
import pytest
from adapter_keras.small_models import (
    STEPS,
    Updates,
    X,
    Y,
    averages,
    compiled,
    dense,
    fit,
    same,
    weights,
)

from swa_core import NothingAveragedError, Schedule, SWAError, SWAWarning
from swa_keras import SWA


def by_hand(model, swa, updates, steps):
    for step in range(steps):
        begin = 6 * (step % STEPS)
        model.train_on_batch(X[begin : begin + 6], Y[begin : begin + 6])
        updates.look(model)
        swa.update(model)


def test_fits_and_loops_take_turns():
    model, updates = dense(), Updates()
    swa = SWA({"start": "3step", "every": "3step"}, finalize=False)
    for _ in range(2):
        fit(model, updates, swa, epochs=1)
        by_hand(model, swa, updates, steps=3)
        fit(model, updates, swa, epochs=2, initial_epoch=1, steps_per_epoch=2)
    assert swa.updates == len(updates.after) == 18
    averages(swa, updates.after)
    begun = SWA({"start": "50%", "every": "1ep"}, finalize=False)
    begun.begin(model, steps_per_epoch=4, total_steps=16)
    updates = Updates()
    updates.look(model)
    updates.after.clear()
    by_hand(model, begun, updates, steps=5)
    fit(model, updates, begun, epochs=4)
    assert begun.schedule == Schedule(8, 4)
    averages(begun, updates.after)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_loops_cannot_go_on_where_epochs_are_counted():
    model, swa = dense(), SWA({"start": "50%", "every": "1ep"}, finalize=False)
    generator = ((X[:6], Y[:6]) for _ in range(9))
    fit(model, swa, data=generator, epochs=1)
    with pytest.raises(SWAError, match=r"update\(\) counts updates, but this training counts epo"):
        swa.update(model)


@pytest.mark.parametrize("validate", ["both", "average"])
def test_a_second_fit_after_the_average_was_swapped_in_and_left_in_the_model(validate):
    # Keras' own averaging crashes on jax in its second fit: buffers were donated twice.
    swa, model, updates = SWA({"start": "2step", "every": "1step"}, validate=validate), dense(), {}
    recorder = Updates()
    for number in range(3):
        history = fit(model, recorder, swa, epochs=2, validation_data=(X, Y))
        updates |= recorder.after
        same(weights(model), swa.averaged_weights)
        assert history.history["val_loss"]
        recorder._latest = weights(model)
        assert swa.n_averaged == 8 * (number + 1) - 1
    averages(swa, updates)


@pytest.mark.parametrize("at", ["a batch", "an epoch"])
def test_fit_ends_on_the_average_however_it_is_stopped(at):
    # Keras' own averaging leaves the raw weights after an early stop.
    swa, model = SWA({"start": "2step", "every": "1step"}), dense()

    def stop(*_, **__):
        model.stop_training = swa.n_averaged >= 4

    hook = {"on_train_batch_end": stop} if at == "a batch" else {"on_epoch_end": stop}
    fit(model, swa, keras.callbacks.LambdaCallback(**hook), epochs=9, validation_data=(X, Y))
    assert swa.n_averaged == {"a batch": 4, "an epoch": 7}[at]
    same(weights(model), swa.averaged_weights)


class Breaks(keras.callbacks.Callback):
    """Raises after so many batches, once."""

    def __init__(self, after, error, hook):
        super().__init__()
        self.left, self.error = after, error
        setattr(self, hook, self.count)

    def count(self, *_, **__):
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize(
    ("place", "at", "error"),
    [
        ("before", 6, ValueError("broken")),
        ("before", 8, KeyboardInterrupt()),
        ("after", 7, KeyboardInterrupt()),
        ("next", 7, ValueError("broken")),
        ("next", 9, KeyboardInterrupt()),
    ],
)
def test_a_fit_that_an_error_ended_is_counted_and_goes_on(place, at, error):
    hook = "on_train_batch_begin" if place == "next" else "on_train_batch_end"
    breaks = Breaks(at + (place == "next"), error, hook)
    model, updates = dense(), Updates()
    swa = SWA({"start": "3step", "every": "4step"}, finalize=False)
    callbacks = [updates, breaks, swa] if place == "before" else [updates, swa, breaks]
    with pytest.raises(type(error)):
        fit(model, *callbacks, validation_data=(X, Y))
    assert swa.updates == len(updates.after) == at
    # What is trained without the callback does not count, as far as can be known: after a batch
    # has begun, one more update may belong to it.
    if place != "next":
        fit(model, epochs=1)
    fit(model, updates, swa, epochs=1, validation_data=(X, Y))
    assert swa.updates == len(updates.after) == at + STEPS
    averages(swa, updates.after)
    assert "evaluate" not in vars(model)


def test_a_snapshot_that_an_error_came_before_is_taken_when_training_goes_on():
    model, updates = dense(), Updates()
    swa = SWA({"start": "3step", "every": "4step"}, finalize=False)
    breaks = Breaks(7, ValueError("broken"), "on_train_batch_end")
    with pytest.raises(ValueError, match="broken"):
        fit(model, updates, breaks, swa)
    assert swa.n_averaged == 1
    with pytest.raises(SWAError, match=r"call swa\.begin\(model\) first"):
        swa.update(model)
    swa.begin(model)
    assert swa.n_averaged == 2
    by_hand(model, swa, updates, steps=4)
    averages(swa, updates.after)


class Breakable(keras.Sequential):
    armed = False

    def train_step(self, *arguments):
        if self.armed:
            raise KeyboardInterrupt
        return super().train_step(*arguments)


def test_the_average_outlives_a_model_that_is_lost():
    # An error in the first step of a fit leaves no values in the variables on jax.
    keras.utils.set_random_seed(7)
    model = Breakable([keras.Input((4,)), keras.layers.Dense(1)])
    compiled(model, run_eagerly=True)
    swa = SWA({"start": "1step", "every": "1step"}, finalize=False)
    fit(model, swa, epochs=1)
    model.armed = True
    with pytest.raises(KeyboardInterrupt):
        fit(model, swa, epochs=1)
    assert swa.updates == swa.state_dict()["n_updates"] == STEPS
    other = compiled(Breakable([keras.Input((4,)), keras.layers.Dense(1)]))
    resumed = SWA(swa.config)
    resumed.load_state_dict(swa.state_dict())
    fit(other, resumed, epochs=1)
    assert resumed.n_averaged == 2 * STEPS


def test_update_in_a_fit_that_counts_by_itself_is_refused():
    swa = SWA({"start": "2step", "every": "1step"})
    hook = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: swa.update(swa.model))
    with pytest.raises(SWAError, match="during a fit that has this callback"):
        fit(dense(), swa, hook)


@pytest.mark.parametrize(
    ("start", "every", "finalize"),
    [("29step", "1step", True), ("5ep", "1ep", False), ("0%", "20step", True)],
)
def test_a_training_without_a_snapshot_is_warned_of_at_its_start(start, every, finalize):
    swa, model, at = SWA({"start": start, "every": every}, finalize=finalize), dense(), []
    hook = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_, **__: at.append(len(caught))
    )
    with pytest.warns(SWAWarning, match="no snapshot falls into this training") as caught:
        fit(model, swa, hook)
    ours = [str(one.message) for one in caught if one.category is SWAWarning]
    assert at[0]  # before the first batch, and nothing more at the end
    assert len(ours) == 1
    assert "It ends at update 16, and the schedule is Schedule(start=" in ours[0]
    with pytest.raises(NothingAveragedError, match="after 16 updates"):
        swa.finalize()
    # In later ones the callback goes on counting, and the warning is not repeated.
    fit(model, swa, epochs=1)
    fit(model, swa, epochs=3)
    assert swa.n_averaged


def test_percentages_that_are_rounded_up_past_the_end():
    # Seven updates in three epochs of two and a half: "100%" is the end of a fourth.
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    swa = SWA({"start": "100%", "every": "1ep", "stop": "100%"})
    with pytest.warns(SWAWarning, match="no snapshot falls into this training"):
        fit(dense(optimizer), swa, epochs=3, batch_size=5)
    assert swa.schedule == Schedule(8, 2, 8)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_epochs_without_a_snapshot_are_warned_of_too():
    from adapter_keras.small_models import stream

    with pytest.warns(SWAWarning, match=r"ends at epoch 4, .*Schedule\(start=9"):
        fit(dense(), SWA({"start": "9ep", "every": "1ep"}), data=stream())


def test_a_training_whose_snapshots_are_past_is_warned_of():
    swa = SWA({"start": "1ep", "every": "1ep", "stop": "2ep"})
    with pytest.warns(SWAWarning, match="no snapshot falls into this training"):
        fit(dense(), swa, initial_epoch=2)
    swa, model = SWA({"start": "1ep", "every": "1ep", "stop": "2ep"}), dense()
    fit(model, swa)
    fit(model, swa)  # which ends on the average that there is
    assert swa.n_averaged == 2
    same(weights(model), swa.averaged_weights)


def test_no_epochs_at_all():
    swa, model = SWA({"start": "75%"}), dense()
    before = weights(model)
    fit(model, swa, epochs=0)  # a warning would be an error: there was nothing to average
    assert swa.schedule is None
    with pytest.warns(SWAWarning, match="no snapshot was averaged in 0 updates"):
        fit(model, swa, epochs=3, initial_epoch=3)
    same(weights(model), before)
    fit(model, swa, epochs=4)
    assert swa.n_averaged


def test_epochs_shorter_than_an_update_are_refused_as_a_measure():
    def accumulating():
        return dense(keras.optimizers.SGD(0.05, gradient_accumulation_steps=6))

    with pytest.raises(SWAError, match="4 batches of an epoch make no update of 6"):
        fit(accumulating(), SWA({"start": "50%", "every": "1ep"}))
    updates, swa = Updates(), SWA({"start": "40%", "every": "1step"}, finalize=False)
    fit(accumulating(), updates, swa, epochs=6)
    assert swa.schedule == Schedule(2, 1)
    averages(swa, updates.after)
