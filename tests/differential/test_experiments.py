"""The experiments are the same in the three frameworks, and can be interrupted in each of them.

A training of a few updates, on images that are noise around those of their classes.
"""

from __future__ import annotations

import importlib
import pickle
from functools import cache

import numpy as np
import pytest
from experiments.arms import Arm, arms
from experiments.images import Images
from experiments.networks import NETWORKS, PreResNet
from experiments.seeds import FRAMEWORKS
from experiments.settings import Experiment

from swa_core import SWAConfig

SEED, CLASSES = 3, 4


@cache
def images(network: str) -> Images:
    """Four updates an epoch."""
    experiment = Experiment(
        name="tiny",
        dataset="none",
        network=network,
        train_images=64,
        test_images=24,
        epochs=4,
        batch_size=16,
        rate=0.02,
        swa_rate=0.01,
        cycle_high=0.01,
        cycle_low=0.001,
        momentum=0.9,
        weight_decay=5e-2,  # so much that its absence shows
        ema_decay=0.8,
        shift=1,
        flip=True,
        config=SWAConfig(start="50%", every="1ep"),
    )
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 88).astype(np.int32)
    y[:CLASSES] = range(CLASSES)
    x = rng.normal(0, 1, (CLASSES, 12, 12, 3))[y] + rng.normal(0, 1, (88, 12, 12, 3))
    x = x.astype(np.float32)
    return Images(experiment, x[:64], y[:64], x[64:], y[64:])


def arm_of(network: str, name: str) -> Arm:
    """An arm of the experiment."""
    (found,) = (one for one in arms(images(network).experiment) if one.name == name)
    return found


def begun(framework: str, network: str, arm: str):
    training = importlib.import_module(FRAMEWORKS[framework]).Training(images(network), SEED)
    training.begin(arm_of(network, arm))
    return training


def train(training, network: str, arm: str, first: int, epochs: int) -> None:
    begin = arm_of(network, arm).begin + first
    for epoch in range(begin, begin + epochs):
        training.epoch(images(network).epoch(SEED, epoch), epoch)


def everything(training, arm: str, network: str) -> list[np.ndarray]:
    averages = [name for name, _ in arm_of(network, arm).averages]
    found = [leaf for name in averages for leaf in training.average(name)]
    found += [training.logits(name, bn=True) for name in averages]
    return [*found, training.logits(None, bn=False)]


@pytest.mark.parametrize("network", [*NETWORKS, "all kinds of blocks"])
def test_networks_are_the_same_at_first(network, monkeypatch):
    blocks = PreResNet(8, 1, ((8, 1), (12, 1), (16, 2)))
    monkeypatch.setitem(NETWORKS, "all kinds of blocks", blocks)
    found = [begun(name, network, "trunk").logits(None, bn=False) for name in FRAMEWORKS]
    assert np.abs(found[0]).max() > 0.5
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "arm"), [("vgg-small", "constant"), ("preresnet-6", "cyclical")]
)
def test_trainings_are_the_same(network, arm):
    wanted = None
    for name in FRAMEWORKS:
        training = begun(name, network, arm)
        train(training, network, arm, 0, 3)
        averages = [average for average, _ in arm_of(network, arm).averages]
        snapshots = {average: training.snapshots(average) for average in averages}
        leaves = [leaf for average in averages for leaf in training.average(average)]
        assert snapshots["swa"] == [4, 8, 12]
        assert snapshots.get("ema", [4, 5])[:2] == [4, 5]
        found = snapshots, leaves, training.logits("swa", bn=True)
        wanted = wanted or found
        assert found[0] == wanted[0], name
        for ours, theirs in zip(leaves, wanted[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-4, err_msg=name)
        # torch keeps the unbiased variance, Keras and JAX the biased one.
        np.testing.assert_allclose(found[2], wanted[2], rtol=0, atol=0.05, err_msg=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_training_goes_on_from_its_state(framework):
    network, arm = "vgg-small", "cyclical"
    training = begun(framework, network, arm)
    train(training, network, arm, 0, 2)
    state = pickle.dumps(training.state(averages=True))
    train(training, network, arm, 2, 1)
    wanted, snapshots = everything(training, arm, network), training.snapshots("swa")

    training = begun(framework, network, arm)
    training.restore(pickle.loads(state))
    train(training, network, arm, 2, 1)
    assert training.snapshots("swa") == snapshots == [4, 8, 12]
    for found, leaf in zip(everything(training, arm, network), wanted, strict=True):
        np.testing.assert_array_equal(found, leaf)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_looking_does_not_disturb(framework):
    network, arm = "vgg-small", "constant"
    results = []
    for looks in (False, True):
        training = begun(framework, network, arm)
        train(training, network, arm, 0, 2)
        if looks:
            for average in ("swa", "ema", None):
                plain = training.logits(average, bn=False)
                recomputed = training.logits(average, bn=True)
                assert plain.shape == (24, CLASSES)
                assert np.abs(plain - recomputed).max() > 1e-3
                np.testing.assert_array_equal(training.logits(average, bn=False), plain)
        train(training, network, arm, 2, 1)
        results.append(everything(training, arm, network))
    for quiet, looked_at in zip(*results, strict=True):
        np.testing.assert_array_equal(quiet, looked_at)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_arm_goes_on_from_the_end_of_another(framework):
    network = "vgg-small"
    trunk = begun(framework, network, "trunk")
    train(trunk, network, "trunk", 0, 1)
    end = pickle.dumps(trunk.state(averages=False))
    logits = trunk.logits(None, bn=False)
    trunk.begin(arm_of(network, "constant"))
    train(trunk, network, "constant", 0, 1)
    wanted = trunk.average("swa")

    arm = begun(framework, network, "constant")
    arm.restore(pickle.loads(end))  # with the momentum, or it would be another training
    arm.begin(arm_of(network, "constant"))
    np.testing.assert_array_equal(arm.logits(None, bn=False), logits)
    assert arm.snapshots("swa") == []
    train(arm, network, "constant", 0, 1)
    for found, leaf in zip(arm.average("swa"), wanted, strict=True):
        np.testing.assert_array_equal(found, leaf)
