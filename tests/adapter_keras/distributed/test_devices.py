"""Averages of trainings on several devices and in several processes, each in its own way of doing
so: ``keras.distribution`` on jax, ``tf.distribute`` on tensorflow, DDP on torch.

How many devices there are is settled when a process starts, so each launch is made once, and every
check of it is a test here.
"""

from __future__ import annotations

import importlib
import os

import pytest
from adapter_keras.distributed.launching import Launch, launch

LAUNCHES = {
    "jax": [Launch("jax_devices", "jax", 1, 8), Launch("jax_processes", "jax", 2, 2)],
    "tensorflow": [Launch("tf_strategies", "tensorflow", 1, 1)],
    "torch": [Launch("torch_ranks", "torch", 2, 1)],
}[os.environ["KERAS_BACKEND"]]


def checks(which: Launch) -> list[str]:
    return [*importlib.import_module(f"adapter_keras.distributed.{which.module}").CHECKS]


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """What the checks of a launch came to."""
    folder = tmp_path_factory.mktemp("processes")
    done: dict[Launch, dict[str, str | None]] = {}

    def of(which: Launch) -> dict[str, str | None]:
        if which not in done:
            done[which] = launch(which, folder)
        return done[which]

    return of


@pytest.mark.parametrize(
    ("which", "name"),
    [pytest.param(w, name, id=f"{w.module}-{name}") for w in LAUNCHES for name in checks(w)],
)
def test_devices(launched, which, name):
    fault = launched(which)[name]
    assert fault is None, fault
