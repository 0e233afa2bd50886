"""update_bn against float64 numpy, on every kind of data, with everything else left as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, everything, same, stream, with_batch_norm

from swa_core import BatchNormError, SWAWarning
from swa_keras import SWA, update_bn

RNG = np.random.default_rng(3)


def one_layer(shape, **arguments):
    layer = keras.layers.BatchNormalization(**arguments)
    return keras.Sequential([keras.Input(shape), layer]), layer


def check(layer, mean, variance):
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-6)


def test_the_statistics_are_those_of_the_pooled_data_with_a_ragged_last_batch():
    data = RNG.normal(3, 2, (37, 6, 5, 4)).astype("float32")
    model, layer = one_layer((6, 5, 4))
    update_bn(model, data, batch_size=8)
    exact = data.astype("float64")
    check(layer, exact.mean((0, 1, 2)), exact.var((0, 1, 2)))


def test_axis_not_last():
    data = RNG.normal(-1, 3, (10, 4, 6)).astype("float32")
    model, layer = one_layer((4, 6), axis=1)
    update_bn(model, data, batch_size=3)
    exact = data.astype("float64")
    check(layer, exact.mean((0, 2)), exact.var((0, 2)))


def test_a_mean_far_from_zero_costs_no_precision():
    data = (1000 + RNG.normal(size=(64, 3))).astype("float32")
    model, layer = one_layer((3,))
    update_bn(model, data, batch_size=16)
    exact = data.astype("float64")
    np.testing.assert_allclose(array(layer.moving_mean), exact.mean(0), rtol=3e-7)
    np.testing.assert_allclose(array(layer.moving_variance), exact.var(0), rtol=1e-6)


def test_masked_steps_do_not_count():
    data = RNG.normal(size=(9, 5, 3)).astype("float32")
    lengths = RNG.integers(1, 5, 9)
    for row, length in zip(data, lengths, strict=True):
        row[length:] = 0
    inputs = keras.Input((5, 3))
    layer = keras.layers.BatchNormalization()
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    update_bn(model, data, batch_size=4)
    seen = np.concatenate([row[:n] for row, n in zip(data, lengths, strict=True)]).astype("float64")
    np.testing.assert_allclose(array(layer.moving_mean), seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), seen.var(0), rtol=1e-5)


def test_nested_layers_each_see_batches_normalised_by_their_own_statistics():
    keras.utils.set_random_seed(1)
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    )
    inputs = keras.Input((4,))
    last = keras.layers.BatchNormalization()
    model = keras.Model(inputs, last(keras.layers.Dense(2)(inner(inputs))))
    update_bn(model, X, batch_size=10)
    first = inner.layers[-1]
    kernel, bias = map(array, inner.layers[0].trainable_variables)
    hidden = X.astype("float64") @ kernel + bias
    check(first, hidden.mean(0), hidden.var(0))
    kernel, bias = map(array, model.layers[-2].trainable_variables)
    outputs = []
    for begin in (0, 10, 20):
        batch = hidden[begin : begin + 10]
        batch = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + first.epsilon)
        outputs.append(batch @ kernel + bias)
    outputs = np.concatenate(outputs)
    check(last, outputs.mean(0), outputs.var(0))


class Subclassed(keras.Model):
    """Without a word of training in its call, and with one layer used twice."""

    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.norm(x[:, :2]) * 0 + x[:, 2:])


def test_a_layer_used_twice_pools_both_uses():
    model = Subclassed()
    model(X)
    update_bn(model, X, batch_size=12)
    exact = X.astype("float64")
    both = np.concatenate([exact[:, :2], exact[:, 2:]])
    check(model.norm, both.mean(0), both.var(0))


def test_frozen_layers_are_left_alone():
    keras.utils.set_random_seed(1)
    frozen, free = keras.layers.BatchNormalization(), keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), frozen, free])
    frozen.trainable = False
    update_bn(model, 5 + X)
    check(frozen, np.zeros(4), np.ones(4))
    assert array(free.moving_mean).min() > 4


def test_all_other_state_is_bit_identical():
    model = with_batch_norm()
    norm = model.layers[1]
    model.fit(X, Y, verbose=0)
    statistics = {id(norm.moving_mean), id(norm.moving_variance)}

    def others():
        found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
        return [array(v) for v in found if id(v) not in statistics]

    before, momentum = others(), norm.momentum
    update_bn(model, (X, Y))
    same(others(), before)
    assert norm.momentum == momentum
    assert "_moments" not in vars(norm)


def test_dropout_masks_are_fresh_for_every_batch():
    keras.utils.set_random_seed(1)
    layer = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dropout(0.5), layer])
    update_bn(model, np.ones((256, 1), "float32"), batch_size=1)
    # The same mask for all batches would make the mean 0 or 2.
    assert 0.7 < array(layer.moving_mean)[0] < 1.3


def test_nothing_changes_when_the_data_raises():
    model = with_batch_norm()
    before = everything(model)

    def broken():
        yield X[:6]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        update_bn(model, broken())
    same(everything(model), before)


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        return X[6 * number : 6 * number + 6], Y[6 * number : 6 * number + 6]


BATCHES = [(X[n : n + 6], Y[n : n + 6]) for n in range(0, 24, 6)]
KINDS = {
    "array": lambda: X,
    "tensor": lambda: keras.ops.convert_to_tensor(X),
    "x and y": lambda: (X, Y),
    "x, y and sample weights": lambda: (X, Y, np.ones(24)),
    "list of batches": lambda: BATCHES,
    "list of inputs": lambda: [x for x, _ in BATCHES],
    "generator": lambda: iter(BATCHES),
    "PyDataset": Rows,
    "dataset or loader": stream,
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_data_that_fit_takes(kind):
    model, layer = one_layer((4,))
    update_bn(model, KINDS[kind](), batch_size=6)
    exact = X.astype("float64")
    check(layer, exact.mean(0), exact.var(0))


def test_several_inputs():
    for several in (lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b]):
        inputs = several(keras.Input((4,), name="a"), keras.Input((1,), name="b"))
        layer = keras.layers.BatchNormalization()
        joined = layer(keras.layers.Concatenate()(keras.tree.flatten(inputs)))
        model = keras.Model(inputs, joined)
        update_bn(model, (several(X, Y), Y), batch_size=7)
        exact = np.concatenate([X, Y], axis=1).astype("float64")
        check(layer, exact.mean(0), exact.var(0))


def test_half_precision_policies_keep_exact_moments():
    data = (100 + RNG.normal(size=(64, 3))).astype("float32")
    layer = keras.layers.BatchNormalization(dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((3,)), layer])
    update_bn(model, data, batch_size=16)
    # The inputs are bfloat16, and what is pooled of them is not.
    if keras.backend.backend() == "torch":
        import torch

        seen = torch.tensor(data).bfloat16().double().numpy()
    else:
        import ml_dtypes

        seen = data.astype(ml_dtypes.bfloat16).astype("float64")
    check(layer, seen.mean(0), seen.var(0))


def test_no_batch_norm_is_a_no_op_that_says_so():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.warns(SWAWarning, match="no batch norm"):
        update_bn(model, X)


@pytest.mark.parametrize(
    "empty", [[], np.zeros((0, 4), "float32"), iter(())], ids=["list", "array", "iterator"]
)
def test_no_data_is_an_error(empty):
    model, layer = one_layer((4,))
    with pytest.raises(BatchNormError, match="no batch"):
        update_bn(model, empty)
    check(layer, np.zeros(4), np.ones(4))


def test_data_without_an_end_is_an_error():
    tf = pytest.importorskip("tensorflow")
    model, _ = one_layer((4,))
    with pytest.raises(BatchNormError, match="no end"):
        update_bn(model, tf.data.Dataset.from_tensor_slices(X).batch(6).repeat())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"renorm": True}, "renormalisation"), ({"momentum": 1.0}, "is 1")]
)
def test_layers_whose_statistics_cannot_be_replaced_are_refused(arguments, message):
    model, _ = one_layer((4,), **arguments)
    with pytest.raises(BatchNormError, match=message):
        update_bn(model, X)


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()])
    with pytest.raises(BatchNormError, match="not built"):
        update_bn(model, X)


def test_data_that_is_none():
    model, _ = one_layer((4,))
    with pytest.raises(TypeError, match="expected arrays or batches"):
        update_bn(model, 3)


def test_finalize_and_averaged_recompute_on_bn_data():
    model, other = with_batch_norm(), with_batch_norm()
    swa = SWA({"start": "1step", "every": "1step"}, bn_data=(X, Y), validate="raw")
    model.fit(X, Y, batch_size=6, epochs=2, verbose=0, callbacks=[swa])
    for variable, value in zip(other.trainable_variables, swa.averaged_weights, strict=True):
        variable.assign(value)
    update_bn(other, X)
    norm = other.layers[1]
    # Dropout comes after batch norm here, so the statistics depend on nothing random.
    check(model.layers[1], array(norm.moving_mean), array(norm.moving_variance))
    model.fit(X, Y, verbose=0)
    before = everything(model)
    with swa.averaged(bn_data=X):
        check(model.layers[1], array(norm.moving_mean), array(norm.moving_variance))
    same(everything(model), before)
    with pytest.raises(BatchNormError, match="no batch"):
        swa.finalize(bn_data=[])
    same(everything(model), before)


def test_data_with_nan_is_refused_and_the_statistics_stay():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="norm")])
    with pytest.raises(BatchNormError, match="norm would hold NaN or Inf"):
        update_bn(model, [np.ones((4, 2), np.float32), np.full((4, 2), np.nan, np.float32)])
    assert model.get_layer("norm").moving_mean.numpy().tolist() == [0.0, 0.0]
    assert model.get_layer("norm").moving_variance.numpy().tolist() == [1.0, 1.0]
