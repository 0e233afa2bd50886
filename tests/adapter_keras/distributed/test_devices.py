"""Averages of trainings on several devices and in several processes, each in its own way of doing
so: ``keras.distribution`` on jax, ``tf.distribute`` on tensorflow, DDP on torch.

How many devices there are is settled when a process starts, so each launch is made once, and every
check of it is a test here.
"""

from __future__ import annotations

import os

import pytest
from processes.launching import Launch, cases

FOLDER = "adapter_keras.distributed"
LAUNCHES = {
    "jax": [Launch(FOLDER, "jax_devices", 1, 8), Launch(FOLDER, "jax_processes", 2, 2)],
    "tensorflow": [Launch(FOLDER, "tf_strategies", 1, 1)],
    "torch": [Launch(FOLDER, "torch_ranks", 2, 1)],
}[os.environ["KERAS_BACKEND"]]


@pytest.mark.parametrize(("which", "name"), cases(LAUNCHES))
def test_devices(launched, which, name):
    fault = launched(which)[name]
    assert fault is None, fault
