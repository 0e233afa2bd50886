"""The loss around a model's weights, and that the model comes back as it was."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
from adapter_keras.small_models import X, Y, array, dense, everything, fit, same, with_batch_norm

from swa_core import (
    GeometryError,
    NothingAveragedError,
    StructureError,
    SwappedError,
    SWAWarning,
    load_average,
)
from swa_keras import SWA, SWAOptimizer, loss_line, loss_plane, loss_rays, update_bn
from swa_keras.given_weights import arrays_of

LAST = {"start": "10step", "every": "2step"}


def loss(model):
    return model.evaluate(X, Y, batch_size=24, verbose=0)[0]


def squares(model):
    return sum(float((array(v) ** 2).sum()) for v in model.trainable_variables)


def weights(model):
    return [array(v) for v in model.trainable_variables]


CALLS = {
    "line": lambda model, a, b, c, measure, **more: loss_line(
        model, a, b, measure, positions=[0.5], **more
    ),
    "plane": lambda model, a, b, c, measure, **more: loss_plane(
        model, a, b, c, measure, points=2, **more
    ),
    "rays": lambda model, a, b, c, measure, **more: loss_rays(
        model, a, measure, radii=[0.5], directions=2, **more
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture
def trained():
    """A model in the middle of its training, with the average and two sets of weights."""
    model, swa, kept = with_batch_norm(), SWA(LAST, bn_data=X), []
    swa.begin(model)
    for update in range(18):
        model.train_on_batch(X[update % 3 :: 2], Y[update % 3 :: 2])
        swa.update(model)
        kept.append(model.get_weights())
    return model, swa, kept[13], kept[15]


def test_a_quadratic_is_a_parabola_along_a_line():
    model = dense()
    first, second = weights(model), [w + 1 for w in weights(model)]
    line = loss_line(model, first, second, squares)
    a, b = (np.concatenate([w.ravel() for w in some]) for some in (first, second))
    t = line.positions
    expected = (1 - t) ** 2 * (a @ a) + 2 * t * (1 - t) * (a @ b) + t**2 * (b @ b)
    assert line.values() == pytest.approx(expected, rel=1e-5)
    assert line.length == pytest.approx(np.sqrt(a.size), rel=1e-6)


def test_batch_norm_is_recomputed_at_each_place(trained):
    model, _, first, second = trained
    layer = model.layers[1]
    seen = []

    def measure(model):
        found = array(layer.moving_mean), array(layer.moving_variance)
        update_bn(model, X, batch_size=6, verbose=0)
        seen.append(found)
        np.testing.assert_allclose(found[0], array(layer.moving_mean), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1], array(layer.moving_variance), rtol=1e-5)
        return float(found[0].sum())

    line = loss_line(model, first, second, measure, bn_data=X, batch_size=6, positions=[0.5])
    assert len(seen) == 3
    assert len(set(line.values())) == 3


def test_without_data_the_statistics_are_the_models_and_a_warning_says_so(trained, call):
    model, swa, first, second = trained
    mean = array(model.layers[1].moving_mean)

    def measure(model):
        np.testing.assert_array_equal(array(model.layers[1].moving_mean), mean)
        # Nothing of this is there at the next place.
        model.layers[1].moving_mean.assign(mean + 1)
        return 0.0

    with pytest.warns(SWAWarning, match="other weights look worse") as said:
        call(model, first, second, swa, measure)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_the_plane_through_two_sets_of_weights_and_the_average(trained):
    model, swa, first, second = trained
    plane = loss_plane(model, first, second, swa, loss, bn_data=X, points=2)
    with swa.averaged(model, bn_data=X):
        expected = loss(model)
    assert plane.at_corners["loss"][2] == pytest.approx(expected, rel=1e-5)


def test_a_step_of_radius_1_is_1_long_and_frozen_weights_stay():
    model = dense()
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    own, frozen = weights(model), array(model.layers[0].kernel)

    def moved(model):
        np.testing.assert_array_equal(array(model.layers[0].kernel), frozen)
        return sum(float(((a - b) ** 2).sum()) for a, b in zip(weights(model), own, strict=True))

    rays = loss_rays(model, None, moved, radii=[1, 2], directions=3)
    assert rays.values() == pytest.approx(np.tile([0, 1, 4], (3, 1)), rel=1e-3)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 2])
def test_everything_is_restored_whatever_is_raised(trained, call, after):
    model, swa, first, second = trained
    keras.utils.set_random_seed(3)
    before = everything(model)
    left = iter(range(after + 1))

    def measure(model):
        loss(model)
        model(X[:2], training=True)  # moves the seed of dropout, and the running statistics
        random.random(), np.random.rand()
        if next(left) == after:
            raise Stop
        return 0.0

    with pytest.raises(Stop):
        call(model, first, second, swa, measure, bn_data=X)
    same(everything(model), before)
    after = random.random(), np.random.rand()
    keras.utils.set_random_seed(3)
    assert after == (random.random(), np.random.rand())


def test_an_error_inside_of_evaluate_leaves_nothing_behind(trained):
    model, _, first, second = trained
    before = everything(model)

    class Raises(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise Stop

    with pytest.raises(Stop):
        loss_line(
            model,
            first,
            second,
            lambda model: model.evaluate(X, Y, verbose=0, callbacks=[Raises()]),
            bn_data=X,
        )
    same(everything(model), before)


def test_training_goes_on_as_if_nothing_had_been_measured(call):
    class Measuring(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                own = self.model.get_weights()
                call(self.model, None, [w * 1.5 for w in own], [w**2 for w in own], loss, bn_data=X)

    trajectories = []
    for others in ((), (Measuring(),)):
        model = with_batch_norm()
        fit(model, *others)
        trajectories.append(everything(model))
    same(*trajectories)


def test_inside_averaged_the_average_stays(trained):
    model, swa, first, _ = trained
    average = swa.averaged_weights
    before = everything(model)
    with swa.averaged(model, bn_data=X):
        line = loss_line(model, None, first, loss, bn_data=X, positions=[])
        same(weights(model), average)
        with pytest.raises(SwappedError, match=r"first set of weights of loss_line\(\)"):
            loss_line(model, swa, first, loss, bn_data=X)
    assert np.isfinite(line.values()).all()
    same(swa.averaged_weights, average)
    same(everything(model), before)


def test_every_form_of_weights_is_the_same(trained, tmp_path):
    model, swa, *_ = trained
    swa.save(tmp_path / "average.safetensors")
    other = with_batch_norm()
    for variable, average in zip(other.trainable_variables, swa.averaged_weights, strict=True):
        variable.assign(average)
    paths = [v.path for v in model.trainable_variables]
    for given in (
        swa,
        swa.averaged_weights,
        other,
        other.get_weights(),
        dict(zip(paths, swa.averaged_weights, strict=True)),
        tmp_path / "average.safetensors",
        load_average(tmp_path / "average.safetensors"),
    ):
        found = arrays_of(given, model, "these")
        assert list(found) == paths
        same(list(found.values()), swa.averaged_weights)


def test_the_average_of_an_optimizer():
    optimizer = SWAOptimizer("sgd", LAST)
    model = dense(optimizer)
    with pytest.raises(NothingAveragedError):
        loss_rays(model, optimizer, squares)
    fit(model)
    average = optimizer.averaged_weights
    line = loss_line(model, None, optimizer, squares, positions=[])
    expected = sum(float((w**2).sum()) for w in average)
    assert line.values()[1] == pytest.approx(expected, rel=1e-5)


def test_overflow_in_batch_norm_is_a_hole():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    own = weights(model)
    x = np.full((6, 4), 3e38, np.float32) * np.float32([[1], [-1]] * 3)
    with np.errstate(all="ignore"):
        line = loss_line(model, own, [w + 1 for w in own], lambda model: 1.0, bn_data=x)
    assert np.isnan(line.values()).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([np.ones((4, 5))], "1 arrays, and the model has 4"),
        ([np.ones((4, 6)), np.ones(5), np.ones((5, 1)), np.ones(1)], r"shape \(4, 6\)"),
        ({"dense/kernel:0": np.ones((4, 5))}, "holds 'dense/kernel:0'"),
    ],
)
def test_weights_of_another_model_are_refused(given, message):
    with pytest.raises(StructureError, match=message):
        loss_line(dense(), None, given, squares)


def test_what_cannot_be_used_is_refused(trained, tmp_path):
    model, _, first, second = trained
    with pytest.raises(GeometryError, match="are the same"):
        loss_line(model, None, model, squares, bn_data=X)
    with pytest.raises(TypeError, match="read only once"):
        loss_line(model, first, second, squares, bn_data=(x for x in [X]))
    with pytest.raises(TypeError, match="got one array"):
        loss_line(model, first, X, squares, bn_data=X)
    with pytest.raises(TypeError, match="clone_model"):
        loss_line(model, first, tmp_path / "model.weights.h5", squares, bn_data=X)
