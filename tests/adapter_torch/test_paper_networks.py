"""The paper's own networks are what they are called, and their configurations train them."""

from __future__ import annotations

from pathlib import Path

import experiments
import pytest
import torch
from experiments import paper_networks, settings, torch_networks
from experiments.arms import arms
from torch.nn import functional as F

FOLDER = Path(experiments.__file__).parent / "paper"
# In millions: of VGG16 with its head of 512 units counted by hand, the others as published, in
# arXiv:1603.05027 and arXiv:1605.07146.
MILLIONS = {"vgg16": 15.25, "vgg16-bn": 15.25, "preresnet-164": 1.70, "wrn-28-10": 36.5}


def test_every_network_has_its_configuration():
    found = {settings.load(path).network for path in FOLDER.glob("*.toml")}
    assert found == paper_networks.NETWORKS.keys() == MILLIONS.keys()


@pytest.mark.parametrize("name", MILLIONS)
def test_a_network_has_its_parameters_and_trains(name):
    network = settings.load(FOLDER / f"{name}.toml").network
    model = torch_networks.build(network, 3, 10, seed=0)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.003)
    # The residual networks end in a mean: a small image is as good, and much faster.
    size = 32 if name.startswith("vgg") else 8
    before = [parameter.detach().clone() for parameter in parameters]
    loss = F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([1, 7]))
    loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert all(moved)


def test_weights_are_those_of_the_seed():
    first, again, other = (
        torch_networks.build("preresnet-164", 3, 10, seed)[0].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_schedule_is_that_of_the_authors():
    experiment = settings.load(FOLDER / "vgg16.toml")
    assert (experiment.start, experiment.steps_per_epoch) == (161, 400)
    constant = next(arm for arm in arms(experiment) if arm.name == "constant")
    assert [round(constant.rate(epoch), 4) for epoch in (80, 113, 145, 200)] == [
        0.05, 0.0298, 0.01, 0.01,
    ]  # fmt: skip
