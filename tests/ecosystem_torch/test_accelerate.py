"""Behind Accelerate's ``prepare``: the plain loop's run, saved and loaded with its own calls."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from adapter_torch.training import batches, network, same, sgd, values
from ecosystem_torch.comparing import close, means
from torch.nn.functional import mse_loss

from swa_torch import SWA

CONFIG = {"start": "4step", "every": "2step"}
LENGTH, EPOCHS = 8, 3
DATA = [*batches(LENGTH)]


def forget():
    """Accelerate keeps what it was told in its classes; as in a new process, it is gone."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def forget_afterwards():
    yield
    forget()


class Run:
    """A training as Accelerate's users write it."""

    def __init__(self, *, dtype=torch.float32, accumulate=1, **options):
        forget()
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, **options
        )
        model = network().to(dtype)
        self.swa = SWA(sgd(model), CONFIG)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.swa, 30)
        rows = [torch.cat(tensors).to(dtype) for tensors in zip(*DATA, strict=True)]
        data = torch.utils.data.TensorDataset(*rows)
        loader = torch.utils.data.DataLoader(data, batch_size=len(data) // LENGTH)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, self.swa, scheduler, loader
        )

    def train(self, begin=0, end=LENGTH * EPOCHS):
        """The batches from begin to end, counted through all epochs."""
        for epoch in range(begin // LENGTH, -(-end // LENGTH)):
            first = max(begin - epoch * LENGTH, 0)
            loader = self.loader
            if first:
                loader = self.accelerator.skip_first_batches(loader, first)
            for number, (x, y) in enumerate(loader, start=epoch * LENGTH + first):
                if number == end:
                    break
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(mse_loss(self.model(x), y))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self

    def end(self):
        tensors = [*self.model.state_dict().values(), *self.swa.averaged_parameters]
        counts = (self.swa.updates, self.swa.n_averaged, self.swa.n_skipped)
        return values(tensors), counts, self.swa.param_groups[0]["lr"]


def same_end(one, other):
    return same(one[0], other[0]) and one[1:] == other[1:]


def plain_loop(dtype=torch.float32, accumulate=1, mixed_precision=None):
    """The same training without Accelerate and, besides, without averaging: the snapshots."""
    model = network().to(dtype)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    snapshots = []
    for number, (x, y) in enumerate(DATA * EPOCHS, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            prediction = model(x.to(dtype))
        if mixed_precision == "bf16":
            prediction = prediction.float()
        (mse_loss(prediction, y.to(dtype)) / accumulate).backward()
        if number % accumulate:
            continue
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        update = number // accumulate
        if update >= 4 and update % 2 == 0:
            snapshots.append(values(model.parameters()))
    return model, snapshots


RUNS = {
    "plain": {},
    "gradient accumulation": {"accumulate": 2},
    "autocast": {"mixed_precision": "bf16"},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_averages_as_the_plain_loop_does(name):
    run = Run(**RUNS[name]).train()
    model, snapshots = plain_loop(**RUNS[name])
    assert isinstance(run.optimizer, AcceleratedOptimizer)
    assert run.swa.updates == LENGTH * EPOCHS // RUNS[name].get("accumulate", 1)
    assert run.swa.n_averaged == len(snapshots) >= 4
    assert same(run.model.state_dict().values(), model.state_dict().values())
    assert close(run.swa.averaged_parameters, means(snapshots))


@pytest.mark.parametrize("interruption", [2, 6, 8, 14])
@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_its_saved_state_it_ends_the_same(name, interruption, tmp_path):
    whole = Run(**RUNS[name]).train().end()
    Run(**RUNS[name]).train(end=interruption).accelerator.save_state(tmp_path)
    resumed = Run(**RUNS[name])
    resumed.accelerator.load_state(tmp_path)
    resumed.train(begin=interruption)
    assert same_end(resumed.end(), whole)
    assert all(average.dtype == torch.float32 for average in resumed.swa.averaged_parameters)


def test_a_state_saved_while_swapped_in_restores_the_live_side(tmp_path):
    run = Run().train(end=10)
    live = run.end()
    with run.swa.averaged():
        run.accelerator.save_state(tmp_path)
    run.train(begin=10)
    whole = run.end()
    resumed = Run()
    resumed.accelerator.load_state(tmp_path)
    assert same_end(resumed.end(), live)
    assert same_end(resumed.train(begin=10).end(), whole)


def test_a_step_that_the_scaler_skips_is_no_update():
    """Accelerate itself asks for a GPU before it scales gradients; its optimizer does not."""
    accelerate.Accelerator(cpu=True)
    model = network()
    swa = SWA(sgd(model), CONFIG)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(swa, scaler=scaler)
    skipped = []
    for number, (x, y) in enumerate(DATA):
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x), y)).backward()
        if number in (1, 5):
            next(model.parameters()).grad[0, 0] = float("inf")
        before = values(model.parameters())
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        assert same(model.parameters(), before) == skipped[-1]
    assert skipped == [number in (1, 5) for number in range(LENGTH)]
    assert (swa.updates, swa.n_averaged, swa.n_skipped) == (6, 2, 0)
