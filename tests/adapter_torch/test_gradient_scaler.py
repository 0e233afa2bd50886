"""Mixed precision: a step that a gradient scaler skips is no update, however it is skipped."""

import copy

import pytest
import torch
from adapter_torch.training import averaging, batches, network, on_disk, same, sgd, values

from swa_core import SWAConfig
from swa_torch import SWA

CONFIG = SWAConfig(start="2step", every="1step")
OVERFLOWS = (1, 4, 5)
MAKERS = {
    "sgd": sgd,
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "sgd fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True),
    "adagrad fused": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05, fused=True),
}


def stretch(model, optimizer, scaler, begin, end, clip=None, dtype=None, after=lambda number: None):
    """Steps begin + 1 to end of one training, some of them with gradients that overflow."""
    for number, (x, y) in enumerate([*batches(end)][begin:], begin):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        if number in OVERFLOWS:
            model[0].weight.grad[0, 0] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        after(number)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("stepped", ["wrapper", "inner"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_that_is_skipped_is_no_update(name, stepped, clip):
    plain, (model, optimizer) = network(), averaging(CONFIG, MAKERS[name])
    alone, counts = MAKERS[name](plain), []
    visited = [values(model.parameters())]

    def after(number):
        counts.append(optimizer.updates)
        if number not in OVERFLOWS:
            visited.append(values(model.parameters()))
        else:
            assert same(model.parameters(), visited[-1])

    scalers = scaler(), scaler()
    stretch(plain, alone, scalers[0], 0, 8, clip)
    stepping = optimizer if stepped == "wrapper" else optimizer.optimizer
    stretch(model, stepping, scalers[1], 0, 8, clip, after=after)
    assert counts == [1, 1, 2, 3, 3, 3, 4, 5]
    assert optimizer.n_averaged == 4
    # Scales are powers of two, so a kernel that divides them out does it without rounding.
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert scalers[0].state_dict() == scalers[1].state_dict()
    for average, seen in zip(
        optimizer.averaged_parameters, zip(*visited[2:], strict=True), strict=True
    ):
        torch.testing.assert_close(average, torch.stack(seen).mean(0))


def test_an_optimizer_that_could_skip_in_its_kernel_is_not_asked_to():
    # It would be stepped then, and counted, for nothing.
    _, optimizer = averaging(CONFIG, MAKERS["adam fused"])
    assert optimizer.optimizer._step_supports_amp_scaling
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("name", ["sgd", "adam fused"])
def test_saved_and_resumed_with_its_scaler_it_goes_on(name):
    whole, optimizer = averaging(CONFIG, MAKERS[name])
    stretch(whole, optimizer, scaler(), 0, 9)
    for interruption in (1, 2, 4, 6):
        (model, before), scales = averaging(CONFIG, MAKERS[name]), scaler()
        stretch(model, before, scales, 0, interruption)
        states = on_disk([model.state_dict(), before.state_dict(), scales.state_dict()])
        (model, after), scales = averaging(CONFIG, MAKERS[name]), scaler()
        for part, state in zip((model, after, scales), states, strict=True):
            part.load_state_dict(state)
        stretch(model, after, scales, interruption, 9)
        assert same(whole.state_dict().values(), model.state_dict().values())
        assert same(optimizer.averaged_parameters, after.averaged_parameters)
        assert after.updates == optimizer.updates == 6


def test_autocast_trains_as_without_and_averages_in_float32():
    plain, (model, optimizer) = network(), averaging(CONFIG)
    disabled = torch.amp.GradScaler("cpu", enabled=False)  # as scripts for bfloat16 have it
    for net, opt in ((plain, sgd(plain)), (model, optimizer)):
        stretch(net, opt, disabled, 0, 1, dtype=torch.bfloat16)
        for number in (2, 3):
            x = torch.full((8, 4), float(number))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(x).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
    assert same(plain.state_dict().values(), model.state_dict().values())
    assert (optimizer.updates, optimizer.n_averaged) == (3, 2)
    assert all(a.dtype == torch.float32 for a in optimizer.averaged_parameters)


def test_a_training_that_overflows_at_every_step_has_no_average():
    model, optimizer = averaging(CONFIG)
    twin = copy.deepcopy(model)
    for x, _ in batches(3):
        optimizer.zero_grad()
        scales = scaler()
        scales.scale(model(x).sum() * float("inf")).backward()
        scales.step(optimizer)
        scales.update()
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (0, 0, 0)
    assert same(twin.parameters(), model.parameters())


def test_one_scaler_serves_several_optimizers():
    models = network(0), network(1)
    optimizers = [SWA(sgd(m), CONFIG) for m in models]
    scales = scaler()
    for number, (x, y) in enumerate(batches(4)):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            scales.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
        if number == 2:
            models[1][0].weight.grad[0, 0] = float("nan")
        for optimizer in optimizers:
            scales.step(optimizer)
        scales.update()
    assert [optimizer.updates for optimizer in optimizers] == [4, 3]
