"""What a single process sees of sharding: nothing, and no time lost for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from swa_core import StructureError
from swa_torch import SWA

FIRST = {"start": "1step", "every": "1step"}
SECOND = {"start": "2step", "every": "1step"}

UNDISTRIBUTED = """
import sys, torch

def train(model, optimizer):
    for _ in range(2):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())

model = torch.nn.Linear(3, 2)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
train(model, sgd)
before = set(sys.modules)
from swa_torch import SWA
optimizer = SWA(sgd, {"start": "1step", "every": "1step"})
train(model, optimizer)
with optimizer.averaged(model):
    pass
optimizer.averaged_state_dict(model)
optimizer.finalize(model)
print([name for name in set(sys.modules) - before if name.startswith("torch.")])
"""


def test_who_does_not_shard_imports_nothing_for_it():
    done = subprocess.run(
        [sys.executable, "-c", UNDISTRIBUTED], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def emptied(parameter: torch.nn.Parameter, number: int) -> None:
    """As DeepSpeed's ZeRO stage 3 leaves a parameter; it is not installed for this test."""
    parameter.ds_id = number
    parameter.ds_shape = parameter.shape
    parameter.ds_numel = parameter.numel()
    parameter.data = torch.empty(0)


def test_parameters_that_deepspeed_has_emptied_are_refused():
    model = torch.nn.Linear(3, 2)
    optimizer = SWA(torch.optim.SGD(model.parameters(), lr=0.1), SECOND)
    emptied(model.bias, 1)
    with pytest.raises(StructureError, match=r"parameter 1 of group 0 .*\(2,\).* ZeRO stage 3"):
        optimizer.step()
    with pytest.raises(StructureError, match="ZeRO stage 3"):
        optimizer.state_dict()
    with pytest.raises(StructureError, match="ZeRO stage 3"):
        SWA(torch.optim.SGD(model.parameters(), lr=0.1), SECOND)


def test_parameters_that_are_emptied_under_way_are_refused():
    model = torch.nn.Linear(3, 2)
    optimizer = SWA(torch.optim.SGD(model.parameters(), lr=0.1), FIRST)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = None
        emptied(parameter, number)
    with pytest.raises(StructureError, match="ZeRO stage 3"):
        optimizer.step()
    assert optimizer.n_averaged == 1


def test_parameters_that_are_empty_of_themselves_are_none_of_these():
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(0, 3))]
    optimizer = SWA(torch.optim.SGD(weights, lr=0.1), FIRST)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert [average.shape for average in optimizer.averaged_parameters] == [(2,), (0, 3)]
