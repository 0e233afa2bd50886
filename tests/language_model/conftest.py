"""What the tests of the language model experiment share: one quicker than its quick one."""

from __future__ import annotations

import dataclasses

import pytest


def pytest_ignore_collect(collection_path, config):
    # It trains in torch, and schedulefree comes with the ecosystem.
    chosen = {*config.adapters, *config.ecosystems}
    return None if {"torch", "torch-ecosystem"} <= chosen else True


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def plan():
    """The quick plan, quicker."""
    from experiments.language_plan import Plan

    quick = Plan.load(quick=True)
    quicker = quick.training | {"updates": 40, "budgets": [0.5, 1]}
    return dataclasses.replace(quick, training=quicker)


@pytest.fixture(scope="session")
def whole_text():
    from experiments import language_text

    return language_text.load((0.8, 0.1, 0.1))


@pytest.fixture
def text(whole_text):
    """Little of every part."""
    parts = ("training", "validation", "test")
    short = {part: getattr(whole_text, part)[:1000] for part in parts}
    return dataclasses.replace(whole_text, **short)
