"""Trainings that change on the way: layers are frozen and freed, a group comes late."""

import pytest
import torch
from adapter_torch.training import batches, network, on_disk, same, values

from swa_core import SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="2step", every="2step")
FROZEN, LATE, FREED, END = 3, 4, 7, 10  # the updates before which it happens


class Model(torch.nn.Module):
    """A trained body beside a layer that is trained later; two names for one weight in it."""

    def __init__(self, seed=0):
        super().__init__()
        self.body = network(seed)
        self.late = torch.nn.Linear(4, 4)
        self.again = torch.nn.Linear(4, 4, bias=False)
        self.again.weight = self.late.weight

    def forward(self, x):
        return self.body(x) + self.again(self.late(x)).mean(1, keepdim=True)


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def made(make, wrapped, updates=0, seed=0):
    """The run as it stands after some updates, but for its values."""
    model = Model(seed)
    optimizer = MAKERS[make](model.body.parameters())
    optimizer = SWA(optimizer, CONFIG) if wrapped else optimizer
    for update in range(1, updates + 1):
        change(model, optimizer, update)
    return model, optimizer


def change(model, optimizer, update):
    if update in (FROZEN, FREED):
        model.body[0].weight.requires_grad_(update == FREED)
    if update == LATE:
        optimizer.add_param_group({"params": model.late.parameters(), "lr": 0.02})


def stretch(model, optimizer, begin, end, after=lambda: None):
    """Updates begin + 1 to end, each of two batches, with clipped gradients."""
    data = [*batches(2 * end)]
    for update in range(begin + 1, end + 1):
        change(model, optimizer, update)
        for x, y in data[2 * update - 2 : 2 * update]:
            (torch.nn.functional.mse_loss(model(x), y) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        # What the frozen weight had for a gradient before, it has no more.
        optimizer.zero_grad(set_to_none=update % 2 == 0)
        model.zero_grad()
        after()


@pytest.mark.parametrize("make", MAKERS)
def test_it_trains_as_alone_and_each_group_has_its_own_average(make):
    plain, alone = made(make, wrapped=False)
    stretch(plain, alone, 0, END)
    model, optimizer = made(make, wrapped=True)
    visited = []
    stretch(model, optimizer, 0, END, lambda: visited.append(values(model.parameters())))
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert (optimizer.updates, optimizer.n_averaged) == (END, 5)
    assert torch.equal(visited[FROZEN - 1][0], visited[FREED - 2][0])
    averages = optimizer.averaged_parameters
    assert len(averages) == len(visited[0]) == 8
    for place, average in enumerate(averages):
        seen = [visited[u - 1][place] for u in (2, 4, 6, 8, 10) if place < 6 or u >= LATE]
        torch.testing.assert_close(average, torch.stack(seen).mean(0))
    with optimizer.averaged():
        assert same(model.parameters(), averages)
        assert model.again.weight is model.late.weight
    assert same(plain.parameters(), model.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_resumed_anywhere_it_is_the_uninterrupted_run(make):
    whole, optimizer = made(make, wrapped=True)
    stretch(whole, optimizer, 0, END)
    for interruption in range(1, END):
        model, before = made(make, wrapped=True)
        stretch(model, before, 0, interruption)
        states = on_disk([model.state_dict(), before.state_dict()])
        model, after = made(make, wrapped=True, updates=interruption, seed=1)
        model.load_state_dict(states[0])
        after.load_state_dict(states[1])
        stretch(model, after, interruption, END)
        assert same(whole.state_dict().values(), model.state_dict().values())
        assert same(optimizer.averaged_parameters, after.averaged_parameters)
        assert after.n_averaged == 5
