"""Copies of the optimizer: in this process, in a file and in another process."""

import copy
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from adapter_torch.training import EVERY_OTHER, averaging, network, same, sgd, train, values
from torch.optim import lr_scheduler

from swa_core import EMA, LearningRate, SWAConfig, SwappedError
from swa_torch import SWA

CONFIG = SWAConfig(
    start="3step", every="2step", rule=EMA(0.7), lr=LearningRate(value=0.01, anneal="6step")
)


def pickled(something):
    return pickle.loads(pickle.dumps(something))


def saved_whole(something):
    file = io.BytesIO()
    torch.save(something, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("begin", [0, 1, 4, 5])
def test_a_copy_of_model_and_optimizer_is_the_same_run(make_copy, begin):
    model, optimizer = averaging(CONFIG)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    train(model, optimizer, begin)
    twin_model, twin, twin_scheduler = make_copy((model, optimizer, scheduler))
    assert twin_scheduler.optimizer is twin
    train(twin_model, twin, 5, seed=1)
    assert optimizer.updates == begin
    train(model, optimizer, 5, seed=1)
    assert (twin.updates, twin.n_averaged) == (optimizer.updates, optimizer.n_averaged)
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.05
    assert same(model.state_dict().values(), twin_model.state_dict().values())
    assert same(optimizer.averaged_parameters, twin.averaged_parameters)
    assert (twin.config, twin.schedule) == (optimizer.config, optimizer.schedule)
    # The twin's hooks are its own.
    train(twin_model, twin.optimizer, 1)
    assert (optimizer.updates, twin.updates) == (begin + 5, begin + 6)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved_whole])
def test_a_copy_of_the_optimizer_alone_has_weights_of_its_own(make_copy):
    # As a copy of a plain optimizer has.
    model, optimizer = averaging()
    train(model, optimizer, 5)
    before, average = values(model.parameters()), optimizer.averaged_parameters
    twin = make_copy(optimizer)
    weights = [p for group in twin.param_groups for p in group["params"]]
    assert same(weights, before)
    for _ in range(3):
        for p in weights:
            p.grad = torch.ones_like(p)
        twin.step()
    assert (optimizer.updates, twin.updates, twin.n_averaged) == (5, 8, 3)
    assert not same(weights, before)
    assert same(model.parameters(), before)
    assert same(optimizer.averaged_parameters, average)
    assert not same(twin.averaged_parameters, average)
    with twin.averaged():
        assert same(weights, twin.averaged_parameters)
        assert same(model.parameters(), before)


def test_averages_around_one_optimizer_are_copied_together():
    model, first = averaging()
    second = SWA(first.optimizer, CONFIG)
    train(model, first, 5)
    twin_model, *twins = copy.deepcopy((model, first, second))
    assert twins[0].optimizer is twins[1].optimizer
    train(model, first, 3, seed=1)
    train(twin_model, twins[1], 3, seed=1)
    assert [twin.updates for twin in twins] == [8, 8]
    for one, other in zip((first, second), twins, strict=True):
        assert same(one.averaged_parameters, other.averaged_parameters)
    with first.averaged(), pytest.raises(SwappedError, match="copying or pickling"):
        pickle.dumps(second)


def test_copies_inside_averaged_are_refused():
    model, optimizer = averaging()
    train(model, optimizer, 4)
    for make_copy in (copy.copy, copy.deepcopy, pickled, saved_whole):
        with optimizer.averaged(), pytest.raises(SwappedError, match="copying"):
            make_copy(optimizer)


def goes_on(model, optimizer, pipe, threads):
    """In another process: trains on, and tells of what came out as plain numbers."""
    torch.set_num_threads(threads)  # sums come out alike where they are cut alike
    train(model, optimizer, 4, seed=1)
    train(model, optimizer.optimizer, 1, seed=2)
    told = [optimizer.updates, optimizer.n_averaged, optimizer.n_skipped]
    pipe.send((told, [average.tolist() for average in optimizer.averaged_parameters]))


def test_another_process_goes_on_with_it_and_leaves_this_average_alone():
    model, optimizer = averaging(CONFIG)
    train(model, optimizer, 6)
    twin_model, twin = copy.deepcopy((model, optimizer))
    average = optimizer.averaged_parameters
    ours, theirs = multiprocessing.Pipe()
    # Torch sends tensors by sharing their memory: the weights are those of both processes then.
    process = multiprocessing.get_context("spawn").Process(
        target=goes_on, args=(model, optimizer, theirs, torch.get_num_threads())
    )
    process.start()
    theirs.close()
    told, averages = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert optimizer.updates == 6
    assert same(optimizer.averaged_parameters, average)
    train(twin_model, twin, 4, seed=1)
    train(twin_model, twin, 1, seed=2)
    assert told == [twin.updates, twin.n_averaged, twin.n_skipped] == [11, 5, 0]
    assert averages == [average.tolist() for average in twin.averaged_parameters]


def test_it_can_be_referred_to_weakly_and_is_freed_at_once():
    model, optimizer = averaging()
    train(model, optimizer, 5)
    inner, average = optimizer.optimizer, weakref.ref(optimizer._average)
    reference = weakref.ref(optimizer)
    assert reference() is optimizer
    del optimizer
    assert reference() is None
    assert average() is None  # and with it as much memory as the weights take
    train(model, inner, 1)


def test_the_repr_is_that_of_the_groups_under_its_own_name():
    inner = sgd(network())
    shown = repr(SWA(inner, EVERY_OTHER))
    assert shown.removeprefix("SWA") == repr(inner).removeprefix("SGD")
