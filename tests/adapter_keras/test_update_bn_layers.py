"""update_bn on every kind of layer, with all other state as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, everything, fit, same

from swa_core import BatchNormError, SWAWarning
from swa_keras import SWA, update_bn

RNG = np.random.default_rng(5)
BACKEND = keras.backend.backend()


def of(*layers, shape=(4,)):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input(shape), *layers])


def check(layer, data, axes=0, rtol=1e-6):
    data = data.astype("float64")
    np.testing.assert_allclose(array(layer.moving_mean), data.mean(axes), rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), data.var(axes), rtol=rtol)


def untouched(layer):
    return not array(layer.moving_mean).any() and (array(layer.moving_variance) == 1).all()


def test_each_channel_counts_its_own_mask():
    data = (30 + RNG.normal(size=(9, 3, 5))).astype("float32")
    mask = RNG.random((9, 3)) < 0.6
    mask[:, 2] = False
    inputs, masks = keras.Input((3, 5)), keras.Input((3,), dtype="bool")
    layer = keras.layers.BatchNormalization(axis=1)
    model = keras.Model([inputs, masks], layer(inputs, mask=masks))
    layer.moving_mean.assign([0.0, 0.0, 7.0])
    update_bn(model, ([data, mask],), batch_size=2, verbose=0)
    for channel in (0, 1):
        seen = data[mask[:, channel], channel].astype("float64")
        np.testing.assert_allclose(array(layer.moving_mean)[channel], seen.mean(), rtol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance)[channel], seen.var(), rtol=1e-5)
    # Masked throughout: nothing is known of it, so it keeps what it had.
    assert (array(layer.moving_mean)[2], array(layer.moving_variance)[2]) == (7.0, 1.0)


def test_a_mask_with_a_mean_far_from_zero():
    data = (1000 + RNG.normal(size=(16, 5, 2))).astype("float32")
    lengths = np.arange(16) % 5 + 1
    lengths[:4] = 0  # a batch that is masked throughout
    mask = np.arange(5) < lengths[:, None]
    inputs, masks = keras.Input((5, 2)), keras.Input((5,), dtype="bool")
    layer = keras.layers.BatchNormalization()
    model = keras.Model([inputs, masks], layer(inputs, mask=masks))
    update_bn(model, ([data, mask],), batch_size=4, verbose=0)
    check(layer, data[mask])


def test_a_layer_called_once_for_each_step_of_time():
    data = RNG.normal(2, 3, size=(10, 6, 4)).astype("float32")
    layer = keras.layers.BatchNormalization()
    update_bn(of(keras.layers.TimeDistributed(layer), shape=(6, 4)), data, verbose=0)
    check(layer, data, (0, 1))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere batch norm computes in float32")
def test_float64_layers_keep_float64_statistics():
    layer = keras.layers.BatchNormalization(dtype="float64")
    model = keras.Sequential([keras.Input((4,), dtype="float64"), layer])
    update_bn(model, X.astype("float64"), batch_size=7, verbose=0)
    check(layer, X, rtol=1e-14)


def test_pure_half_precision_is_rounded_once():
    layer = keras.layers.BatchNormalization(dtype="bfloat16")
    update_bn(of(layer), X, batch_size=6, verbose=0)
    check(layer, X, rtol=1e-2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has it on tensorflow alone")
def test_synchronized():
    import tensorflow as tf

    data = (1000 + X).astype("float32")
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        distributed = keras.layers.BatchNormalization(synchronized=True)
        update_bn(of(distributed), data, batch_size=7, verbose=0)
    alone = keras.layers.BatchNormalization(synchronized=True)
    update_bn(of(alone), data, batch_size=7, verbose=0)
    for layer in (alone, distributed):
        check(layer, data)


class Scaled(keras.layers.BatchNormalization):
    """With moments of its own."""

    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        return mean, variance + 1.0


class Wrapping(keras.layers.BatchNormalization):
    """With a call that leaves the work to its parent."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs * 2.0, training=training, mask=mask)


class ByItself(keras.layers.BatchNormalization):
    """With a call that does all the work."""

    def call(self, inputs, training=None, mask=None):
        if training and self.trainable:
            self.moving_mean.assign(keras.ops.mean(inputs, axis=0))
        return inputs - self.moving_mean


def test_subclasses():
    scaled, wrapping = Scaled(), Wrapping()
    update_bn(of(scaled), X, verbose=0)
    np.testing.assert_allclose(array(scaled.moving_variance), X.var(0) + 1, rtol=1e-6)
    update_bn(of(wrapping), X, batch_size=7, verbose=0)
    check(wrapping, 2 * X)


def test_a_subclass_that_computes_its_statistics_by_itself_is_refused():
    model = of(keras.layers.BatchNormalization(), ByItself(name="own"))
    model.compile("sgd", "mse")
    before = everything(model)
    with pytest.raises(BatchNormError, match=r"own': ByItself computes them in a call of its own"):
        update_bn(model, X, verbose=0)
    same(everything(model), before)
    model.layers[1].trainable = False
    update_bn(model, X, verbose=0)
    check(model.layers[0], X)


class Lookalike(keras.layers.Layer):
    """Batch norm as others write it, not a subclass of Keras'."""

    def build(self, shape):
        self.moving_mean = self.add_weight(
            name="moving_mean", shape=(shape[-1],), trainable=False, initializer="zeros"
        )
        self.moving_variance = self.add_weight(
            name="moving_variance", shape=(shape[-1],), trainable=False, initializer="ones"
        )
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")

    def call(self, inputs, training=None):
        if training:
            self.moving_mean.assign(0.9 * self.moving_mean + 0.1 * keras.ops.mean(inputs, 0))
        return self.scale * (inputs - self.moving_mean)


def test_what_looks_like_batch_norm_and_is_another_class_is_named():
    ours = keras.layers.BatchNormalization()
    model = of(ours, Lookalike(name="foreign"))
    with pytest.warns(SWAWarning, match=r"foreign' \(Lookalike\) keep running statistics"):
        update_bn(model, X, verbose=0)
    assert untouched(model.layers[1])
    check(ours, X)
    model = of(Lookalike(name="foreign"), keras.layers.Dense(1))
    model.compile("sgd", "mse")
    swa = SWA({"start": "1ep", "every": "1ep"})
    with pytest.warns(SWAWarning, match=r"foreign' \(Lookalike\)"):
        fit(model, swa, epochs=1)
    fit(model, swa, epochs=1)  # a second warning would be an error


@pytest.mark.skipif(BACKEND != "torch", reason="torch modules run on torch alone")
def test_batch_norm_of_torch_in_a_wrapper_is_named_and_left_alone():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    ours = keras.layers.BatchNormalization()
    model = of(keras.layers.TorchModuleWrapper(module, output_shape=(None, 3)), ours)
    with pytest.warns(SWAWarning, match="TorchModuleWrapper"):
        update_bn(model, X, batch_size=8, verbose=0)
    norm = module[1]
    assert not norm.running_mean.any()
    assert int(norm.num_batches_tracked) == 0
    assert not norm.training
    assert not untouched(ours)


class Norms(keras.Model):
    """Uses one layer as in inference, and one only if it is told of training."""

    def __init__(self):
        super().__init__()
        self.fixed = keras.layers.BatchNormalization()
        self.norm = keras.layers.BatchNormalization()
        self.unused = keras.layers.BatchNormalization()  # never built, and no hindrance

    def build(self, shape):
        self.fixed.build(shape)
        self.norm.build(shape)


class Attentive(Norms):
    def call(self, x, training=None):
        return self.norm(self.fixed(x, training=False), training=training)


class Deaf(Norms):
    def call(self, x):
        return self.norm(self.fixed(x, training=False))


@pytest.mark.skipif(BACKEND != "jax", reason="functions of jax run on jax alone")
def test_batch_norm_of_flax_in_a_wrapper_is_named_and_left_alone():
    def call(params, state, inputs, training):
        mean = inputs.mean(0) if training else state["batch_stats"]["mean"]
        return (inputs - mean) * params["scale"], {"batch_stats": {"mean": mean}}

    wrapper = keras.layers.JaxLayer(
        call,
        params={"scale": np.ones(4, "float32")},
        state={"batch_stats": {"mean": np.zeros(4, "float32")}},
        name="flax",
    )
    ours = keras.layers.BatchNormalization()
    model = of(wrapper, ours)
    with pytest.warns(SWAWarning, match=r"flax' \(JaxLayer\) keep running statistics"):
        update_bn(model, 3 + X, verbose=0)
    assert not array(wrapper.state["batch_stats"]["mean"]).any()
    check(ours, X - X.mean(0))


def test_a_layer_called_as_in_inference_keeps_its_statistics():
    model = Attentive()
    model(X)
    update_bn(model, 5 + X, verbose=0)
    assert untouched(model.fixed)
    check(model.norm, (5 + X) / np.sqrt(1 + model.fixed.epsilon))


def test_a_model_whose_layers_never_train_is_a_no_op_that_says_so():
    model = Deaf()
    model(X)
    with pytest.warns(SWAWarning, match=r"no batch-norm layer was in training mode.*training"):
        update_bn(model, X, verbose=0)
    assert untouched(model.norm)


def test_a_layer_that_was_never_built_is_none_to_update():
    model = Norms()
    model.build((None, 4))
    model.fixed.trainable = model.norm.trainable = False
    with pytest.warns(SWAWarning, match="no batch norm to update"):
        update_bn(model, X, verbose=0)


class Contrastive(keras.Model):
    """Trained by a step of its own, on batches that are no (x, y)."""

    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()


def test_a_forward_of_ones_own():
    model = Contrastive()
    model.norm.build((None, 4))
    model.built = True
    batches = [{"image": X[n : n + 6], "text": [0]} for n in range(0, 24, 6)]
    update_bn(
        model,
        batches,
        forward=lambda m, batch: m.norm(batch["image"], training=True),
        verbose=0,
    )
    check(model.norm, X)
    update_bn(model, (2 * X, Y), forward=lambda m, b: m.norm(b[0] + b[1], training=True), verbose=0)
    check(model.norm, 2 * X + Y)


class OnTheHost(keras.layers.Layer):
    """What no compiler can follow."""

    def call(self, inputs):
        return keras.ops.convert_to_tensor(array(inputs) * 3.0)

    def compute_output_shape(self, shape):
        return shape


def test_a_model_that_runs_eagerly_is_not_compiled():
    layer = keras.layers.BatchNormalization()
    model = of(OnTheHost(), layer)
    model.compile("sgd", "mse", run_eagerly=True)
    update_bn(model, X, verbose=0)
    check(layer, 3 * X)


class WithLoss(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def test_losses_of_layers_are_not_left_over():
    model = of(WithLoss(), keras.layers.BatchNormalization())
    update_bn(model, X, verbose=0)
    model(keras.ops.convert_to_tensor(X))
    np.testing.assert_allclose([array(loss) for loss in model.losses], [(X**2).mean()], rtol=1e-6)


def test_spectral_normalization_computes_with_the_kernel_the_model_has():
    wrapper = keras.layers.SpectralNormalization(keras.layers.Dense(3))
    layer = keras.layers.BatchNormalization()
    model = of(wrapper, keras.layers.Dropout(0.3), layer)
    model(X[:1], training=True)
    wrapper.layer.kernel.assign(wrapper.layer.kernel * 0.5)  # as an average may be
    model.layers[1].rate = 0.0
    before = [array(v) for v in model.variables if v is not layer.moving_mean]
    update_bn(model, X, verbose=0)
    kernel, bias = array(wrapper.layer.kernel), array(wrapper.layer.bias)
    check(layer, X.astype("float64") @ kernel + bias, rtol=1e-5)
    after = [array(v) for v in model.variables if v is not layer.moving_mean]
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1  # the moving variance
    assert "normalized_weights" not in vars(wrapper)


def test_the_states_of_rnns_and_seeds_are_bit_identical():
    keras.utils.set_random_seed(1)
    layer = keras.layers.BatchNormalization()
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(6, 5, 4)),
            keras.layers.GRU(3, stateful=True, recurrent_dropout=0.2),
            keras.layers.GaussianNoise(0.1),
            layer,
        ]
    )
    data = RNG.normal(size=(24, 5, 4)).astype("float32")
    statistics = {id(layer.moving_mean), id(layer.moving_variance)}

    states = model.layers[0].states  # which are none of the model's variables
    states[0].assign(RNG.normal(size=states[0].shape))

    def others():
        return [array(v) for v in [*model.variables, *states] if id(v) not in statistics]

    before = others()
    update_bn(model, data, batch_size=6, verbose=0)
    same(others(), before)
    assert not untouched(layer)


def test_renorm_is_refused_at_the_start_of_a_training_with_bn_data():
    model = of(keras.layers.BatchNormalization(renorm=True), keras.layers.Dense(1))
    model.compile("sgd", "mse")
    with pytest.raises(BatchNormError, match="renormalisation"):
        fit(model, SWA({"start": "1ep"}, bn_data=X))
    assert int(array(model.optimizer.iterations)) == 0


def test_one_compiled_pass_serves_all_validations_of_a_training(monkeypatch):
    from swa_keras import batch_norm

    made = []
    recorder = batch_norm.recorder
    monkeypatch.setattr(batch_norm, "recorder", lambda *a: made.append(a) or recorder(*a))
    model = of(keras.layers.BatchNormalization(), keras.layers.Dense(1))
    model.compile("sgd", "mse")
    swa = SWA({"start": "1ep", "every": "1ep"}, bn_data=X)
    fit(model, swa, validation_data=(X, Y))
    assert len(made) == 1
    with swa.averaged():
        check(model.layers[0], X)
    model.layers[1].trainable = False  # another model, for all that is compiled
    model.compile("sgd", "mse")
    other = SWA({"start": "1ep", "every": "1ep"}, bn_data=2 * X)
    fit(model, other, validation_data=(X, Y))
    check(model.layers[0], 2 * X)


def test_within_a_training_the_statistics_are_there_to_stay():
    model = of(keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    update = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: update_bn(model, X, verbose=0)
    )
    fit(model, update, epochs=2)
    dense, norm = model.layers[:2]
    check(norm, X.astype("float64") @ array(dense.kernel) + array(dense.bias))
