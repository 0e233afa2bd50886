"""How ``fit`` runs its steps: compiled or not, several in one execution, in a step of one's own."""

from __future__ import annotations

import keras
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
    fit,
    stream,
    weights,
)

from swa_core import ConfigError, Schedule
from swa_keras import SWA

BACKEND = keras.backend.backend()
needs_executions = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has no steps_per_execution on torch"
)


# All other tests run with jit_compile="auto", which compiles on tensorflow and jax. On torch
# jit_compile=True is torch.compile, which needs a C++ compiler.
@pytest.mark.parametrize("mode", ["jit_compile=False", "run_eagerly=True"])
def test_steps_that_are_not_compiled(mode):
    name, value = mode.split("=")
    updates, swa = Updates(), SWA({"start": "2step", "every": "3step"})
    fit(dense(**{name: value == "True"}), updates, swa, epochs=2, validation_data=(X, Y))
    assert swa.n_averaged == 3
    averages(swa, updates.after)


class Ends(keras.callbacks.Callback):
    """The weights at the end of every execution, by the number of the batch (there is no word of
    those inside)."""

    def __init__(self):
        super().__init__()
        self.after = {}

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        self.after[int(array(model.optimizer._iterations))] = weights(model)


@needs_executions
@pytest.mark.parametrize(
    ("per_execution", "accumulation", "start", "every", "expected"),
    [
        (2, None, "4step", "2step", [4, 6, 8, 10, 12]),
        (3, None, "4step", "4step", [4, 8, 12]),  # 3 and 1 batches
        (3, None, "3step", "4step", [3, 7, 11]),
        (8, None, "1ep", "1ep", [4, 8, 12]),  # a whole epoch, and more
        (4, 2, "2step", "2step", [4, 8, 12]),
        (2, 4, "1step", "1step", [4, 8, 12]),
    ],
)
def test_snapshots_fall_on_the_ends_of_executions(
    per_execution, accumulation, start, every, expected
):
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulation)
    ends, swa = Ends(), SWA({"start": start, "every": every}, validate="raw", finalize=False)
    fit(dense(optimizer, steps_per_execution=per_execution), ends, swa, epochs=3)
    assert sorted(ends.after)[-1] == 3 * STEPS
    snapshots = {n: ends.after[batch] for n, batch in enumerate(expected, start=1)}
    averages(swa, snapshots, Schedule(1, 1))


@needs_executions
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_executions_of_data_of_unknown_length():
    ends, swa = Ends(), SWA({"start": "1ep", "every": "1ep"}, finalize=False)
    model = dense(steps_per_execution=3)
    fit(model, ends, swa, data=stream(5), epochs=2)  # 3 and 2 batches
    assert swa.updates == 10
    averages(swa, {1: ends.after[5], 2: ends.after[10]}, Schedule(1, 1))
    late = SWA({"start": "6step", "every": "1step"})
    with pytest.raises(ConfigError, match="update 6 falls inside an execution of 3 steps"):
        fit(dense(steps_per_execution=3), late, data=stream(5), epochs=2)
    exact = SWA({"start": "8step", "every": "99step"})
    fit(dense(steps_per_execution=3), exact, data=stream(5), epochs=2)
    assert exact.n_averaged == 1


@needs_executions
def test_executions_in_a_later_fit_and_from_an_initial_epoch():
    swa = SWA({"start": "2step", "every": "2step"}, finalize=False)
    fit(dense(steps_per_execution=2), swa, epochs=4, initial_epoch=3)
    assert (swa.updates, swa.n_averaged) == (16, 2)
    odd = SWA({"start": "1step", "every": "2step"}, finalize=False)
    model = dense()
    fit(model, odd, epochs=1, steps_per_epoch=3)
    compiled(model, steps_per_execution=2)
    fit(model, odd, epochs=1)  # updates 4 to 7, of which 5 and 7 are snapshots
    assert odd.n_averaged == 4
    fit(model, SWA({"start": "2step", "every": "2step"}, finalize=False), epochs=1)
    with pytest.raises(ConfigError, match="update 1 falls inside"):
        fit(model, SWA({"start": "1step", "every": "2step"}), epochs=1)


@needs_executions
def test_loss_scaling_inside_executions_is_refused():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
    with pytest.raises(ConfigError, match="loss scaling may leave out updates"):
        fit(dense(optimizer, steps_per_execution=2), SWA({"start": "2step", "every": "2step"}))


@needs_executions
def test_a_rate_for_every_update_inside_executions_is_refused():
    lr = {"value": 0.01, "anneal": "1ep"}
    with pytest.raises(ConfigError, match=r"swa\.lr: anneal and cycle set a rate for every update"):
        fit(dense(steps_per_execution=2), SWA({"start": "50%", "lr": lr}))
    model = dense(steps_per_execution=2)
    fit(model, SWA({"start": "50%", "lr": {"value": 0.01}}))
    assert float(array(model.optimizer.learning_rate)) == pytest.approx(0.01)


class OwnStep(keras.Model):
    """A train_step written out, as users do, on each backend."""

    def __init__(self, updates_per_batch=1):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.updates_per_batch = updates_per_batch

    def call(self, x):
        return self.dense(x)

    def train_step(self, *arguments):
        step = {"jax": self._jax, "tensorflow": self._tensorflow, "torch": self._torch}[BACKEND]
        for _ in range(self.updates_per_batch - 1):
            result = step(*arguments)
            arguments = (result[1], *arguments[1:]) if BACKEND == "jax" else arguments
        return step(*arguments)

    def _jax(self, state, data):
        import jax

        trained, others, optimizer, metrics = state
        x, y = data

        def loss_of(trained, others):
            predicted, others = self.stateless_call(trained, others, x)
            return keras.ops.mean((predicted - y) ** 2), others

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, others)
        trained, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trained)
        return {"loss": loss}, (trained, others, optimizer, metrics)

    def _tensorflow(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x) - y) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}

    def _torch(self, data):
        import torch

        x, y = data
        self.zero_grad()
        loss = keras.ops.mean((self(x) - y) ** 2)
        loss.backward()
        variables = self.trainable_variables
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        return {"loss": loss}


def own_step(**arguments):
    keras.utils.set_random_seed(7)
    model = OwnStep(**arguments)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model(X)
    return model


def test_a_train_step_of_ones_own():
    updates, swa = Updates(), SWA({"start": "50%", "every": "3step"})
    fit(own_step(), updates, swa)
    assert swa.n_averaged == 3
    averages(swa, updates.after)
