"""averaged() and finalize(): the average stands in, and the live weights always return."""

import pytest
import torch
from adapter_torch.training import EVERY_OTHER, averaging, batches, network, same, train, values

from swa_core import (
    BatchNormError,
    NothingAveragedError,
    StructureError,
    SWAConfig,
    SwappedError,
    SWAWarning,
)
from swa_torch import SWA, scratch, swap


def trained(updates=7, **kwargs):
    model, optimizer = averaging(**kwargs)
    train(model, optimizer, updates)
    return model, optimizer


def inputs(number=3):
    return [x for x, _ in batches(number, seed=5)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_weights_return_whatever_is_raised(error):
    model, optimizer = trained()
    live, average = values(model.parameters()), optimizer.averaged_parameters
    where = [p.data_ptr() for p in model.parameters()]

    def use():
        with optimizer.averaged():
            assert same(model.parameters(), average)
            assert same(optimizer.averaged_parameters, average)
            assert [p.data_ptr() for p in model.parameters()] == where
            raise error

    with pytest.raises(error):
        use()
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, average)
    train(model, optimizer, 1)


def test_large_and_half_precision_weights_swap(monkeypatch):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", 10)  # so that every matrix is cut
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(7, 3)),
        torch.nn.Parameter(torch.randn(2, 3, 4).bfloat16()),
        torch.nn.Parameter(torch.randn(12, 2).t()),
        torch.nn.Parameter(torch.randn(2, 25).double()),
        torch.nn.Parameter(torch.randn(4).half()),
    ]
    optimizer = SWA(torch.optim.SGD(weights, lr=1.0), {"start": "1step", "every": "1step"})
    for _ in range(3):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
    live, average = values(weights), optimizer.averaged_parameters
    with optimizer.averaged():
        assert same(weights, [a.to(p.dtype) for a, p in zip(average, weights, strict=True)])
        assert same(optimizer.averaged_parameters, average)
    assert same(weights, live)
    assert same(optimizer.averaged_parameters, average)


def test_a_swap_that_is_interrupted_is_taken_back(monkeypatch):
    monkeypatch.setattr(scratch, "SCRATCH_ELEMENTS", 10)
    model, optimizer = trained()
    live, average = values(model.parameters()), optimizer.averaged_parameters
    exchange, calls = swap._exchange, []

    def interrupted(*piece):
        calls.append(piece)
        if len(calls) == 3:
            raise KeyboardInterrupt
        exchange(*piece)

    monkeypatch.setattr(swap, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        pytest.fail("must not be entered")
    assert len(calls) == 5  # two there, one interrupted, two back
    assert same(model.parameters(), live)
    assert same(optimizer.averaged_parameters, average)
    train(model, optimizer, 1)


def test_step_inside_is_refused_on_both_optimizers():
    model, optimizer = trained()
    train(model, optimizer, 1)
    live = values(model.parameters())
    with optimizer.averaged():
        for stepped in (optimizer, optimizer.optimizer):
            with pytest.raises(SwappedError, match=r"step\(\) after update 8"):
                train(model, stepped, 1)
        assert optimizer.updates == 8
    assert same(model.parameters(), live)


def test_nesting_and_finalizing_inside_are_refused():
    model, optimizer = trained()
    live = values(model.parameters())
    with optimizer.averaged():
        with pytest.raises(SwappedError, match=r"averaged\(\)"), optimizer.averaged():
            pass
        with pytest.raises(SwappedError, match=r"finalize\(\)"):
            optimizer.finalize()
        with pytest.raises(SwappedError, match=r"load_state_dict\(\)"):
            optimizer.load_state_dict(optimizer.state_dict())
    assert same(model.parameters(), live)


def test_before_the_first_snapshot_the_live_weights_stay_and_one_warning_says_so():
    model, optimizer = trained(updates=3)
    live = values(model.parameters())

    def read():
        assert same(optimizer.averaged_parameters, live)

    with pytest.warns(SWAWarning, match="nothing is averaged yet .update 3") as said:
        read()
    assert said[0].filename == __file__
    read()
    with optimizer.averaged():
        assert same(model.parameters(), live)
        with pytest.raises(SwappedError):
            optimizer.step()
    assert same(model.parameters(), live)
    with pytest.raises(NothingAveragedError, match="first snapshot at 4"):
        optimizer.finalize()
    assert same(model.parameters(), live)


def test_the_warning_of_averaged_names_the_users_line():
    _, optimizer = averaging()
    with pytest.warns(SWAWarning) as said, optimizer.averaged():
        pass
    assert said[0].filename == __file__


def test_writing_to_the_weights_inside_is_told_of():
    model, optimizer = trained()
    live = values(model.parameters())

    def use():
        with optimizer.averaged(), torch.no_grad():
            model[0].weight.fill_(3.0)

    with pytest.warns(SWAWarning, match="written to while the average") as said:
        use()
    assert said[0].filename == __file__
    assert same(model.parameters(), live)
    train(model, optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finalize_keeps_the_average_for_good_and_training_may_go_on(dtype):
    model = network().to(dtype)
    optimizer = SWA(torch.optim.SGD(model.parameters(), lr=0.05), EVERY_OTHER)
    for x, _ in batches(7):
        optimizer.zero_grad()
        model(x.to(dtype)).square().mean().backward()
        optimizer.step()
    average = optimizer.averaged_parameters
    optimizer.finalize()
    assert same(model.parameters(), [a.to(dtype) for a in average])
    assert same(optimizer.averaged_parameters, average)
    optimizer.step()
    assert optimizer.n_averaged == 3
    assert not same(model.parameters(), [a.to(dtype) for a in average])


def test_batch_norm_is_recomputed_inside_and_restored_after():
    model, optimizer = trained()
    before = values(model.buffers())
    reference = network()
    with torch.no_grad():
        for p, a in zip(reference.parameters(), optimizer.averaged_parameters, strict=True):
            p.copy_(a)
    hidden = torch.cat([reference[0](x) for x in inputs()])
    for error in (None, ZeroDivisionError):
        try:
            with optimizer.averaged(model, bn_data=inputs()):
                torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
                torch.testing.assert_close(model[1].running_var, hidden.var(0))
                model(torch.randn(9, 4))  # in training mode, so this changes them
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert same(model.buffers(), before)
    optimizer.finalize(model, bn_data=inputs())
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))


@pytest.mark.parametrize("enter", ["averaged", "finalize"])
def test_everything_is_restored_when_the_batches_fail(enter):
    model, optimizer = trained()
    live, average = values(model.parameters()), optimizer.averaged_parameters
    buffers = values(model.buffers())

    def run(bn_data):
        if enter == "finalize":
            optimizer.finalize(model, bn_data=bn_data)
        else:
            optimizer.averaged(model, bn_data=bn_data).__enter__()

    def broken():
        yield inputs()[0]
        raise OSError("disk gone")

    for bn_data, error in (([], BatchNormError), (broken(), OSError), ([object()], TypeError)):
        with pytest.raises(error):
            run(bn_data)
        assert same(model.parameters(), live)
        assert same(model.buffers(), buffers)
        assert same(optimizer.averaged_parameters, average)
    with pytest.raises(TypeError, match="bn_data needs the model"):
        optimizer.averaged(bn_data=inputs()).__enter__()
    with pytest.raises(TypeError, match="bn_data needs the model"):
        optimizer.finalize(bn_data=inputs())
    train(model, optimizer, 1)


def test_autocast_forgets_the_weights_it_has_cast():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    config = SWAConfig(start="1step", every="1step")
    optimizer = SWA(torch.optim.SGD([weight], lr=1.0), config)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()  # 0, -1, -2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.eye(2)
        assert torch.nn.functional.linear(x, weight)[0, 0] == -2
        with optimizer.averaged():
            assert torch.nn.functional.linear(x, weight)[0, 0] == -1
        assert torch.nn.functional.linear(x, weight)[0, 0] == -2


def test_a_changed_model_is_refused_before_anything_is_swapped():
    model, optimizer = trained()
    model[3].weight.data = torch.zeros(1, 7)
    live = values(model.parameters())
    with pytest.raises(StructureError, match=r"averaged\(\): parameter 4 of group 0"):
        optimizer.averaged().__enter__()
    assert same(model.parameters(), live)
